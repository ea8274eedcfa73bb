"""Token sets made of numbers."""

from __future__ import annotations

from siliang.data.small_table import Column, SmallTable
from siliang.data.tokens import TokenSet
from siliang.tasks import CAUSAL_LM, Task


def token_set(rows: list[list[int]], task: Task = CAUSAL_LM, **columns: list[list[int]]) -> TokenSet:
    """Rows of these tokens, all of which are learned."""
    found: dict[str, Column] = {
        name: [*lists] for name, lists in {"input_ids": rows, "labels": rows, **columns}.items()
    }
    return TokenSet(SmallTable(found, dict.fromkeys(found, "int64")), task.data)
