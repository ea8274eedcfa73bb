"""Columns that a layout does not use: which of them may have been intended for training."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from siliang.data.words import stands_alone

SAMPLE_CELLS = 200  # per column
WORDS = 3  # minimum for running text; in scripts without blanks, characters
CHARACTERS = 12
# names of columns whose texts belong to the question, even if they are short
ASKED = ("system", "system_prompt", "context", "question", "query", "input", "prompt", "instruction")
PARTS_NAMED = ("split", "set", "subset", "fold", "partition", "part")
PARTS = ("train", "training", "test", "testing", "dev", "eval", "evaluation", "val", "valid", "validation", "holdout")


class UnusedColumns:
    """The content of the unused columns, from a sample of their cells.

    Attributes:
        parts: The parts of the data that a column names, such as train and test.
    """

    def __init__(self) -> None:
        self.parts: dict[str, set[str]] = {}
        self._cells: dict[str, list[str]] = {}
        self._running: dict[str, int] = {}

    def look(self, values: Mapping[str, object], taken: Mapping[str, str]) -> None:
        """Looks at one row.

        Args:
            taken: The layout's column of each part.
        """
        used = taken.values()
        known: list[str] | None = None
        for name, value in values.items():
            if name in used or not isinstance(value, str) or not value.strip():
                continue
            if name.strip().lower() in PARTS_NAMED and value.strip().lower() in PARTS:
                self.parts.setdefault(name, set()).add(value.strip())
            cells = self._cells.setdefault(name, [])
            if len(cells) >= SAMPLE_CELLS:
                continue
            if known is None:
                known = [text.strip() for column in used for text in _texts(values.get(column)) if text.strip()]
            cells.append(value)
            # what is one of the used texts, or is written out of them, is learned already
            again = value.strip() in known or (len(known) > 1 and all(text in value for text in known))
            self._running[name] = self._running.get(name, 0) + (not again and _is_running(name, value))

    def is_running_text(self, column: str) -> bool:
        """Most of the column's cells are texts, and not all are one and the same."""
        cells = self._cells.get(column, [])
        return self._running.get(column, 0) * 2 > len(cells) and (column.lower() in ASKED or len(set(cells)) > 1)


def _is_running(name: str, text: str) -> bool:
    words = [word for word in text.split() if any(c.isalpha() for c in word)]
    return len(words) >= WORDS or (bool(words) and name.lower() in ASKED) or sum(map(stands_alone, text)) >= CHARACTERS


def _texts(value: object) -> Collection[str]:
    """The texts in a cell, however deep."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [text for held in value for text in _texts(held)] if isinstance(value, list | tuple) else []
