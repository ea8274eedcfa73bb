"""All rows of a source at once."""

from __future__ import annotations

from collections.abc import Iterator

from siliang.data.reading import DataRow, Reading
from siliang.data.sources import open_source
from siliang.types import DataError


def iter_rows(source: str, *, header: list[str] | None = None, split: str = "train") -> Iterator[DataRow]:
    reading = Reading(header)
    opened = open_source(source, reading)
    yield from opened.rows(opened.part(split), reading)


def read_rows(source: str, *, header: list[str] | None = None, split: str = "train") -> list[DataRow]:
    rows = list(iter_rows(source, header=header, split=split))
    if not rows:
        raise DataError(f"{source} holds no rows.")
    return rows
