"""What tokenizing makes of an example: entries, one a window, each with the number of its example in `row`.

An example of which nothing is made keeps one entry, so that it can be named; its `row` is below zero and says why. Its
number is kept, and not its place: tokens are kept by content, and the same content may stand in another place.
"""

from __future__ import annotations

from typing import Any

from siliang.language import Bilingual

Rows = list[dict[str, Any]]
DROPPED = -1  # left out for its length
BETWEEN = "\x1f"  # the languages of a reason in that column
BAD = "bad"  # the column for what is wrong with an example; its `row` is `bad_row(number)`


def stored(reason: str) -> str:
    """A reason as the column `bad` keeps it, in both languages; tokens are kept for readers of either."""
    return f"{reason}{BETWEEN}{reason.zh}" if isinstance(reason, Bilingual) else reason


def reason_of(kept: str) -> str:
    """The reason that was `stored`."""
    en, between, zh = kept.partition(BETWEEN)
    return Bilingual(en, zh) if between else en


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
