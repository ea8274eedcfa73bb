"""What tokenizing makes of an example: entries, one a window, each with the number of its example in `row`.

An example of which nothing is made keeps one entry, so that it can be named; its `row` is below zero and says why. Its
number is kept, and not its place: tokens are kept by content, and the same content may stand in another place.
"""

from __future__ import annotations

from typing import Any

Rows = list[dict[str, Any]]
DROPPED = -1  # left out for its length
BAD = "bad"  # the column for what is wrong with an example; its `row` is `bad_row(number)`


def bad_row(number: int) -> int:
    """What stands in `row` for the example of this number, which could not be used."""
    return DROPPED - 1 - number


def is_bad(row: int) -> bool:
    """Whether `row` is that of an example that could not be used."""
    return row < DROPPED


def number_of_bad(row: int) -> int:
    """The example's number, from `bad_row`."""
    return DROPPED - 1 - row


def dropped(labels: Any) -> Rows:
    """The entry of an example that is left out for its length.

    Args:
        labels: An empty value of the column's kind.
    """
    return [{"input_ids": [], "labels": labels, "row": DROPPED}]
