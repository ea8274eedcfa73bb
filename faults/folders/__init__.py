"""Folders that were made to do harm: what each tries, in a process that is watched, and what came of it.

`python -m faults.folders` tries them all; `--only links pages` some kinds, `--name tokenizer` those of some names.
"""
