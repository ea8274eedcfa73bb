"""Speed and memory: siliang compared with its peers, and with the machine's own limit, on the same workloads.

In the order of reading: `workloads` (what is trained), `folders` (their models and data), `record` (a job and its
result), `steps` (shared by the measurements of all libraries), `ours` and `peer` (a measurement of each), `limit` (only
the matrix products), `gate` (whether both trained the same), `rounds` (the order of measurements, each in a separate
process), `table` (the report from the records).

`methods_table` measures what every method learns, at its own best learning rate; `methods_page` is the report.
"""
