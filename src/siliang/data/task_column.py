"""The task of each row, which a column of the data names, for methods that train several tasks at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from siliang.data.example import Example
from siliang.data.numbers import is_whole
from siliang.language import Bilingual
from siliang.secrets import short_repr

TASK_IDS = "task_ids"  # the column of the table of tokens, and what the model calls them
MOST_TASKS = 2**31


def with_task(example: Example | str, values: Mapping[str, object], column: str | None) -> Example | str:
    """The example with the task that its row names, or what is wrong with it.

    Args:
        example: Or what is wrong with the row already.
        column: That names the task; None where none does.
    """
    if column is None or isinstance(example, str):
        return example
    value = values.get(column)
    number = int(value) if isinstance(value, str) and is_whole(value.strip()) else value
    if type(number) is not int or not 0 <= number < MOST_TASKS:
        text = short_repr(value)
        return Bilingual(
            f"has {text} in {column!r}, where a task's number belongs (0, 1, ...)",
            f"的 {column!r} 是 {text}，应为任务编号（0、1……）",
        )
    return replace(example, task=number)
