"""Speed and memory: siliang compared with its peers, and with the machine's own limit, on the same workloads.

In the order of reading: `workloads` (what is trained), `folders` and `rows` (their models and data), `record` (a job
and its result), `steps` (shared by the measurements of all libraries), `ours` and `peer` (a measurement of each), with
the peers' `peft_trainer`, `trl_trainers`, `unsloth_trainer`, `unsloth_settings` and `swift_trainer`, `environments` (of
peers that need other libraries than siliang), `limit` (only the matrix products), `gate` (whether both trained the
same), `settings` (the search for a peer's best), `rounds` (the order of measurements, each in a separate process),
`job` (such a process), `table` (the report from the records).

`startup` says what takes how long until the first step. `methods_table` measures what every method learns, at its own
best learning rate; `methods_page` is the report.
"""
