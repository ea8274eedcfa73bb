"""Reads rows from files, folders and the hub, each with the place it came from, so that a bad one can be named."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siliang.types import DataError

FILE_KINDS = (".json", ".jsonl", ".csv", ".tsv")


@dataclass(frozen=True)
class Row:
    """One row of the data.

    Attributes:
        where: `file:line`, or `file, item n` where lines mean nothing.
        problem: Why it cannot be used; None for a row that was read.
    """

    values: dict[str, Any]
    where: str
    problem: str | None = None


def read_rows(source: str, *, header: list[str] | None = None, split: str = "train") -> list[Row]:
    """All rows of `source`; an unreadable one comes with its problem.

    Args:
        source: A .json, .jsonl, .csv or .tsv file, a folder from Dataset.save_to_disk, or a name on the hub.
        header: Column names of a csv or tsv file without a header line.
        split: Which part of a folder or hub data set that has several.

    Raises:
        DataError: There is no such source, it is of an unknown kind, or it holds nothing.
    """
    path = Path(source)
    if path.is_file():
        readers = {".json": _json, ".jsonl": _jsonl, ".csv": _table, ".tsv": _table}
        if path.suffix not in readers:
            raise DataError(
                f"{source}: {path.suffix or 'no ending'} is not a kind of file that can be read. Allowed: "
                f"{', '.join(FILE_KINDS)}, or a folder from Dataset.save_to_disk."
            )
        rows = list(_table(path, header)) if path.suffix in (".csv", ".tsv") else list(readers[path.suffix](path))
    elif path.is_dir():
        rows = _dataset(_from_disk(path), split, source)
    elif path.suffix in FILE_KINDS or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise DataError(f"There is no data file or folder {source}.")
    else:
        rows = _dataset(_from_hub(source), split, source)
    if not rows:
        raise DataError(f"{source} holds no rows.")
    return rows


def sha256(sources: list[str]) -> str:
    """A hash over the bytes of the data files; of a hub name, over the name."""
    digest = hashlib.sha256()
    for source in sources:
        path = Path(source)
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
        digest.update(b"" if files else source.encode())
        for file in files:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 text. Save the file as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None


def _row(value: Any, where: str) -> Row:
    if isinstance(value, dict):
        return Row(value, where)
    return Row({}, where, f"must be an object with named fields, not {type(value).__name__}")


def _json(path: Path) -> Iterator[Row]:
    text = _text(path)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        hint = " It looks like one object a line: name it .jsonl." if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}.{hint}") from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply to be data.") from None
    if not isinstance(values, list):
        raise DataError(f"{path} must hold a list of objects: [{{...}}, {{...}}].")
    for i, value in enumerate(values, start=1):
        yield _row(value, f"{path}, item {i}")


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield _row(json.loads(line), where)
        except (json.JSONDecodeError, RecursionError) as error:
            yield Row({}, where, f"not valid JSON: {getattr(error, 'msg', 'nested too deeply')}")


def _table(path: Path, header: list[str] | None = None) -> Iterator[Row]:
    # quotes are text in a tsv file: SST-2 and its kind have unpaired ones
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    reader = csv.reader(_text(path).splitlines(keepends=True), strict=True, **style)
    names = header
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row({}, f"{path}:{reader.line_num}", f"not readable as {path.suffix[1:]}: {error}")
            continue
        if not fields:
            continue
        if names is None:
            names = fields
        elif len(fields) != len(names):
            yield Row(
                {},
                f"{path}:{reader.line_num}",
                f"has {len(fields)} columns, not {len(names)} ({', '.join(names)})",
            )
        else:
            yield Row(dict(zip(names, fields, strict=True)), f"{path}:{reader.line_num}")


def _from_disk(path: Path) -> Any:
    from datasets import load_from_disk

    try:
        return load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a folder from Dataset.save_to_disk: {_first_line(error)}") from None


def _from_hub(name: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name)
    except Exception as error:  # the hub's client raises many kinds, all of which mean that the data is not to be had
        raise DataError(
            f"{name} is no file or folder here, and the hub did not give it: {_first_line(error)}"
        ) from None


def _dataset(loaded: Any, split: str, source: str) -> list[Row]:
    if isinstance(loaded, dict):
        if split not in loaded:
            raise DataError(f"{source} has no part {split!r}; it has {', '.join(loaded)}.")
        loaded = loaded[split]
    return [Row(dict(values), f"{source}, row {i}") for i, values in enumerate(loaded, start=1)]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
