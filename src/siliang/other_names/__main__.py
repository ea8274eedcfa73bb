"""Prints docs/names.md."""

from siliang.other_names import as_markdown

print(as_markdown(), end="")
