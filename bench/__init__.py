"""Speed and memory: siliang beside its peers, and beside the machine's own limit, on workloads that are the same.

In the order of reading: `workloads` (what is trained), `folders` (the models and data for it), `record` (a job and what
it gave), `steps` (what every library's measurement shares), `ours` and `peer` (a measurement of each), `limit` (the
matrix products alone), `gate` (whether both trained the same), `rounds` (the order of measurements, each in a process
of its own), `table` (what is made from the records).
"""
