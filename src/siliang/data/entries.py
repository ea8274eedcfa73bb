"""The entries of tokenized examples: one per window, each with the index of its example in `row`.

An example without tokens keeps one entry, so that it can be reported; its `row` is negative and encodes the reason. The
index is stored, not the source: tokens are cached by content, and the same content may have another source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Required, TypedDict

from siliang.language import Bilingual

DROPPED = -1  # left out for its length
BETWEEN = "\x1f"  # the languages of a reason in that column
BAD: Final = "bad"  # the column for what is wrong with an example; its `row` is `bad_row(number)`


class TokenEntry(TypedDict, total=False):
    """One entry. A task with further columns adds them in a subclass.

    Attributes:
        token_type_ids: The part of a pair that each token belongs to.
        labels: Of each token, or of the entry.
        sequences: The lengths of the sequences that the entry is.
        bytes: Of the text that is predicted in all entries of an example, in the first of them.
        row: Below zero where nothing is made of the example.
        lost: Tokens that truncation took.
        lost_answer: Those of them that are learned.
        turn: The number of the message that is the last learned answer of a conversation; -1 of anything else.
        whole_answer: Its tokens, where truncation took some of them; otherwise empty.
        bad: What is wrong with the example.
    """

    input_ids: Required[list[int]]
    token_type_ids: list[int] | None
    labels: list[int] | float
    sequences: list[int]
    bytes: int
    row: int
    lost: int
    lost_answer: int
    turn: int
    whole_answer: list[int]
    bad: str


Rows = Sequence[TokenEntry]  # of one example


def token_labels(entry: TokenEntry) -> list[int]:
    """The labels of an entry whose tokens each have one."""
    labels = entry.get("labels")
    assert isinstance(labels, list)
    return labels


def stored(reason: str) -> str:
    """A reason as stored in the column `bad`, in both languages: the cache serves readers of either."""
    return f"{reason}{BETWEEN}{reason.zh}" if isinstance(reason, Bilingual) else reason


def reason_of(kept: str) -> str:
    """The reason that was `stored`."""
    en, between, zh = kept.partition(BETWEEN)
    return Bilingual(en, zh) if between else en


def bad_row(number: int) -> int:
    """The value of `row` for an example that could not be used."""
    return DROPPED - 1 - number


def is_bad(row: int) -> bool:
    """Whether `row` is that of an example that could not be used."""
    return row < DROPPED


def number_of_bad(row: int) -> int:
    """The example's number, from `bad_row`."""
    return DROPPED - 1 - row


def dropped(labels: list[int] | float) -> list[TokenEntry]:
    """The entry of an example that is left out for its length.

    Args:
        labels: An empty value of the column's kind.
    """
    return [{"input_ids": [], "labels": labels, "row": DROPPED}]
