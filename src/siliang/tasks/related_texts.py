"""Texts that belong together, as they are given to predict."""

from __future__ import annotations

from collections.abc import Sequence

from siliang.data.example import Example
from siliang.data.examples import Related
from siliang.language import Bilingual
from siliang.secrets import shortened
from siliang.types import DataError

AS_COLUMNS = {"scored-messages": "scored-pair", "positive-messages": "anchor-positive"}


def as_columns(layout: str) -> str:
    """The layout with the same content in plain columns."""
    return AS_COLUMNS.get(layout, layout)


def only_pair(example: Related) -> Related:
    """The two texts of a row that is to be predicted; negatives are left out.

    Raises:
        DataError: It has several positives.
    """
    if len(example.positives) > 1:
        shown = shortened(example.anchor, 60)
        n = len(example.positives)
        raise DataError(
            Bilingual(
                f"{shown!r} has {n} texts beside it: give one in each row.",
                f"{shown!r} 对应 {n} 段文本：每行请只给一段。",
            )
        )
    return Related(example.anchor, example.positives)


def one_text(given: str | Sequence[str] | Example) -> str | None:
    """A text, also as the only one of a list; None where it is not one."""
    if isinstance(given, str):
        return given
    return given[0] if not isinstance(given, Example) and len(given) == 1 else None


def two_texts(given: str | Sequence[str] | Example) -> tuple[str, str] | None:
    """Two texts, given as a pair or as one text with a tab between them; None where there are not two, or one is
    blank."""
    if isinstance(given, Example):
        return None
    parts = given.split("\t") if isinstance(given, str) else given
    return (parts[0], parts[1]) if len(parts) == 2 and all(part.strip() for part in parts) else None


def in_one_line(given: str | Sequence[str] | Example) -> str:
    """The texts that were given, for a message."""
    if isinstance(given, Example):
        return type(given).__name__
    return shortened(given if isinstance(given, str) else "\t".join(given), 60)
