"""Rows to examples: what is asked and answered, or a text and its class. A row that is neither is named, never dropped
silently.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from siliang.config import Columns, DataConfig
from siliang.data.sources import Row, read_rows
from siliang.types import DataError, TaskType, nearest

SHOWN_BAD_ROWS = 5


@dataclass(frozen=True)
class Turn:
    """One instruction and its answer. With neither instruction nor input, `output` is a text learned whole."""

    output: str
    instruction: str = ""
    input: str = ""

    @property
    def is_plain(self) -> bool:
        return not self.instruction and not self.input


@dataclass(frozen=True)
class Labelled:
    """A text and the number of its class."""

    text: str
    label: int


Example = Turn | Labelled


@dataclass
class Examples:
    """The data of a run, before tokens.

    Attributes:
        labels: The classes' names by number; None for a causal run.
        skipped: The rows left out, with place and reason.
    """

    train: list[Any]
    eval: list[Any]
    labels: list[str] | None = None
    skipped: list[str] = field(default_factory=list)


def load_examples(data: DataConfig, task: TaskType, *, seed: int) -> Examples:
    """Reads and checks the data, and holds out the evaluation rows.

    Raises:
        DataError: The data cannot be read, its columns are not there, or rows are bad and `skip_bad_rows` is off.
    """
    train_rows = read_rows(data.train, header=data.header)
    eval_rows = read_rows(data.eval, header=data.header, split=_eval_split(data)) if data.eval else []
    labels = None
    if task is TaskType.SEQ_CLS:
        _need_columns(train_rows, [data.columns.text, data.columns.label], data)
        labels = data.labels or _find_labels(train_rows, data.columns.label)
        if len(labels) < 2:
            raise DataError(
                f"{data.train}: column {data.columns.label!r} has one class only, {labels}: nothing to learn."
            )
        make = _labelled(data.columns, labels)
    else:
        text_only = data.columns.text in train_rows[0].values and data.columns.output not in train_rows[0].values
        _need_columns(train_rows, [data.columns.text if text_only else data.columns.output], data)
        make = _plain(data.columns) if text_only else _turn(data.columns)
    bad: list[str] = []
    train = _make_all(train_rows, make, bad)
    held_out = _make_all(eval_rows, make, bad)
    if bad and not data.skip_bad_rows:
        raise DataError(bad_rows_message(bad))
    if not train:
        raise DataError(f"{data.train}: not one row can be used. {bad_rows_message(bad)}")
    if data.eval is None and data.eval_fraction > 0 and len(train) > 1:
        order = random.Random(seed).sample(range(len(train)), len(train))
        n = max(1, round(data.eval_fraction * len(train)))
        held_out, train = [train[i] for i in sorted(order[:n])], [train[i] for i in sorted(order[n:])]
    return Examples(train, held_out, labels, bad)


def bad_rows_message(bad: list[str]) -> str:
    """The first few bad rows, and how to go on without them."""
    more = f"; and {len(bad) - SHOWN_BAD_ROWS} more" if len(bad) > SHOWN_BAD_ROWS else ""
    rows = "1 row is bad" if len(bad) == 1 else f"{len(bad)} rows are bad"
    return (
        f"{rows}: {'; '.join(bad[:SHOWN_BAD_ROWS])}{more}.\nMend them, or leave them out with data.skip_bad_rows=true."
    )


def _eval_split(data: DataConfig) -> str:
    return "test" if data.eval == data.train else "train"


def _make_all(rows: list[Row], make: Callable[[dict[str, Any]], Example | str], bad: list[str]) -> list[Any]:
    made = []
    for row in rows:
        result = row.problem or make(row.values)
        if isinstance(result, str):
            bad.append(f"{row.where} {result}")
        else:
            made.append(result)
    return made


def _need_columns(rows: list[Row], wanted: list[str], data: DataConfig) -> None:
    there = next((list(row.values) for row in rows if row.problem is None), None)
    if there is None:
        raise DataError(bad_rows_message([f"{row.where} {row.problem}" for row in rows]))
    for name in wanted:
        if name not in there:
            raise DataError(
                f"{data.train} has no column {name!r}; it has {', '.join(map(repr, there))}.{nearest(name, there)}\n"
                "Say which is which with data.columns (data.columns.text=review), or data.header where the file has no "
                "header line."
            )


def _find_labels(rows: list[Row], column: str) -> list[str]:
    found = {_as_text(row.values.get(column)) for row in rows if row.problem is None} - {""}
    if len(found) > 1000:
        raise DataError(f"column {column!r} has {len(found)} different values: these are no classes.")
    # 2 before 10 where all are numbers
    return sorted(found, key=lambda name: (0, int(name), "") if name.lstrip("-").isdigit() else (1, 0, name))


def _labelled(columns: Columns, labels: list[str]) -> Callable[[dict[str, Any]], Labelled | str]:
    numbers = {name: i for i, name in enumerate(labels)}

    def make(values: dict[str, Any]) -> Labelled | str:
        text, label = _as_text(values.get(columns.text)), _as_text(values.get(columns.label))
        if not text.strip():
            return f"has an empty {columns.text!r}"
        if label not in numbers:
            return f"has the label {label!r}, which is not one of {', '.join(labels)}"
        return Labelled(text, numbers[label])

    return make


def _turn(columns: Columns) -> Callable[[dict[str, Any]], Turn | str]:
    def make(values: dict[str, Any]) -> Turn | str:
        output = _as_text(values.get(columns.output))
        if not output.strip():
            return f"has an empty {columns.output!r}"
        return Turn(output, _as_text(values.get(columns.instruction)), _as_text(values.get(columns.input)))

    return make


def _plain(columns: Columns) -> Callable[[dict[str, Any]], Turn | str]:
    def make(values: dict[str, Any]) -> Turn | str:
        text = _as_text(values.get(columns.text))
        return Turn(text) if text.strip() else f"has an empty {columns.text!r}"

    return make


def _as_text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else str(value)
