"""Malicious folders: what each tries, in a watched process, and the results.

`python -m faults.folders` tries them all; `--only links pages` some kinds, `--name tokenizer` those of some names.
"""
