"""Reads rows from files, folders and the hub, one by one, each with the place it came from, so that a bad one can be
named and a file larger than memory can be read.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from siliang.data.json_stream import json_lines, json_list
from siliang.types import DataError, nearest

COLUMN_FILES = (".bmes", ".bio", ".bioes", ".conll", ".ner")
FILE_KINDS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", *COLUMN_FILES)


@dataclass(frozen=True)
class Row:
    """One row of the data.

    Attributes:
        where: `file:line`, or `source, row n` where lines mean nothing.
        problem: Why it cannot be used; None for a row that was read.
    """

    values: dict[str, Any]
    where: str
    problem: str | None = None


def iter_rows(
    source: str, *, header: list[str] | None = None, split: str = "train", tagged: bool = False
) -> Iterator[Row]:
    """The rows of `source`, in order; an unreadable one comes with its problem.

    Args:
        source: A file, a pattern of files, a folder (from Dataset.save_to_disk, or of files, as a data set's repository
            is), or a name on the hub.
        header: Column names of a csv or tsv file without a header line.
        split: Which part of a folder or hub data set that has several.
        tagged: A .txt file holds a word and its tag a line.

    Raises:
        DataError: There is no such source, it is of an unknown kind, or it is damaged as a whole.
    """
    path = Path(source).expanduser()
    if path.is_file():
        yield from _file(path, header, tagged)
    elif path.is_dir():
        yield from _dataset(_from_folder(path), split, source)
    elif any(c in source for c in "*?[") and (found := sorted(glob.glob(str(path)))):  # noqa: PTH207 (absolute patterns)
        for name in found:
            yield from _file(Path(name), header, tagged)
    elif path.suffix in FILE_KINDS or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise DataError(f"There is no data file or folder {source}.{_neighbours(path)}")
    else:
        yield from _dataset(_from_hub(source), split, source)


def read_rows(source: str, *, header: list[str] | None = None, split: str = "train") -> list[Row]:
    """All rows of `source` at once; see `iter_rows`.

    Raises:
        DataError: As there, and where the source holds nothing.
    """
    rows = list(iter_rows(source, header=header, split=split))
    if not rows:
        raise DataError(f"{source} holds no rows.")
    return rows


def sha256(sources: Sequence[str]) -> str:
    """A hash over the bytes of the data files; of a hub name, over the name."""
    digest = hashlib.sha256()
    for source in sources:
        path = Path(source).expanduser()
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
        files = files or [Path(name) for name in sorted(glob.glob(source))]  # noqa: PTH207
        digest.update(b"" if files else source.encode())
        for file in files:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _neighbours(path: Path) -> str:
    return nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""


def _file(path: Path, header: list[str] | None, tagged: bool) -> Iterator[Row]:
    kind = path.suffix.lower()
    if kind not in FILE_KINDS:
        raise DataError(
            f"{path}: {kind or 'no ending'} is not a kind of file that can be read. Allowed: "
            f"{', '.join(FILE_KINDS)}, or a folder from Dataset.save_to_disk."
        )
    try:
        if kind in (".csv", ".tsv"):
            yield from _table(path, header)
        elif kind in (".parquet", ".arrow"):
            yield from _arrow(path, kind)
        elif kind in COLUMN_FILES or (kind == ".txt" and tagged):
            yield from _tagged(path)
        elif kind == ".txt":
            yield from (
                Row({"text": line.rstrip("\r\n")}, f"{path}:{n}") for n, line in text_lines(path) if line.strip()
            )
        else:
            for where, value, problem in (json_list if kind == ".json" else json_lines)(path):
                if problem is None and not isinstance(value, dict):
                    problem = f"must be an object with named fields, not {type(value).__name__}"
                elif problem is None and not value:
                    problem = "is empty: it has no fields"
                yield Row(value if problem is None else {}, where, problem)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line with its end) of a UTF-8 file, with or without a byte order mark."""
    with path.open("rb") as opened:
        for number, raw in enumerate(opened, start=1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{path}:{number}: not UTF-8 text. Save the file as UTF-8.") from None


def _table(path: Path, header: list[str] | None = None) -> Iterator[Row]:
    # quotes are text in a tsv file: SST-2 and its kind have unpaired ones
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {}
    csv.field_size_limit(2**27)
    reader = csv.reader((line for _, line in text_lines(path)), strict=True, **style)
    names = header
    while True:
        first = reader.line_num + 1
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
            has = f"has {len(fields)} columns, not {len(names)} ({', '.join(names)})"
            yield Row({}, f"{path}:{first}", has)
        else:
            yield Row(dict(zip(names, fields, strict=True)), f"{path}:{first}")


def _tagged(path: Path) -> Iterator[Row]:
    """Sentences of one word and its tag a line, with an empty line between two: CoNLL, BIO, BMES."""
    tokens: list[str] = []
    tags: list[str] = []
    start, problem = 1, None
    for number, ended in chain(text_lines(path), [(0, "")]):
        line = ended.rstrip("\r\n")
        if not line.strip() or line.startswith("-DOCSTART-"):
            if tokens or problem:
                yield Row({"tokens": tokens, "tags": tags}, f"{path}:{start}", problem)
            tokens, tags, start, problem = [], [], number + 1, None
            continue
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) < 2:
            problem = problem or f"has no tag in line {number}: {line!r}"
            continue
        tokens.append(fields[0])
        tags.append(fields[-1].strip())


def _arrow(path: Path, kind: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset, Features

    try:
        if kind == ".parquet":
            file = pq.ParquetFile(path)
            batches, features = file.iter_batches(batch_size=1000), Features.from_arrow_schema(file.schema_arrow)
        else:
            data = Dataset.from_file(str(path))
            batches, features = data.with_format("arrow").iter(batch_size=1000), data.features  # type: ignore[attr-defined]
        name_classes = _class_names(features)
        number = 0
        for batch in batches:
            for values in batch.to_pylist():  # type: ignore[attr-defined]
                number += 1
                yield Row(name_classes(values), f"{path}, row {number}")
    except (pa.ArrowInvalid, pa.ArrowException) as error:
        raise DataError(f"{path} is not a readable {kind[1:]} file: {_first_line(error)}") from None


def _from_folder(path: Path) -> Any:
    """What Dataset.save_to_disk wrote, or files of data whose names say their part (train.jsonl, test.jsonl)."""
    from datasets import load_dataset, load_dataset_builder, load_from_disk

    saved = ("dataset_info.json", "dataset_dict.json")
    try:
        if any((path / name).is_file() for name in saved):
            _stay_inside(path, _named_in_saved(path))
            return load_from_disk(str(path))
        _quieten()
        named = load_dataset_builder(str(path)).config.data_files or {}
        _stay_inside(path, [str(file) for files in named.values() for file in files])  # type: ignore[union-attr]
        return load_dataset(str(path))
    except DataError:
        raise
    except Exception as error:  # `datasets` raises kinds of its own for each kind of file
        raise DataError(
            f"{path} holds no data: {_first_line(error)}\n"
            "Name a file in it, a folder from Dataset.save_to_disk, or one of files such as train.jsonl and test.jsonl."
        ) from None


def _named_in_saved(path: Path) -> list[str]:
    """The files that a saved data set says it consists of."""
    names = []
    for file in (*path.glob("dataset_dict.json"), *path.rglob("state.json")):
        values = json.loads(file.read_text(encoding="utf-8"))
        listed = values.get("splits") or [entry["filename"] for entry in values.get("_data_files") or []]
        names += [str(file.parent / name) for name in listed]
    return names


def _stay_inside(path: Path, names: list[str]) -> None:
    """A data set's own description must not lead to other files of this machine."""
    root = path.resolve()
    for name in names:
        if "://" not in name and not (root / name).resolve().is_relative_to(root):
            raise DataError(f"{path} names {name}, which is not inside of it.")


def _from_hub(name: str) -> Any:
    from datasets import load_dataset

    path, _, config = name.partition(":")
    try:
        _quieten()
        return load_dataset(path, config or None)
    except Exception as error:  # the hub's client raises many kinds, all of which mean that the data is not to be had
        raise DataError(
            f"{name} is no file or folder here, and the hub did not give it: {_first_line(error)}\n"
            "Look at its name and at the network, or save the data to a file (.jsonl, .parquet) and name that."
        ) from None


def _quieten() -> None:
    """Bars are for people, and each of the client's attempts for nobody: the error says it once."""
    import logging

    from datasets import disable_progress_bars, enable_progress_bars

    (enable_progress_bars if sys.stderr.isatty() else disable_progress_bars)()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _dataset(loaded: Any, split: str, source: str) -> Iterator[Row]:
    if isinstance(loaded, dict):
        # what is held out goes by several names
        wanted = [split] if split != "test" else ["test", "validation", "dev"]
        found = next((name for name in wanted if name in loaded), None)
        if found is None:
            raise DataError(f"{source} has no part {split!r}; it has {', '.join(loaded)}.")
        loaded = loaded[found]
    name_classes = _class_names(loaded.features)
    for i, values in enumerate(loaded, start=1):
        yield Row(name_classes(dict(values)), f"{source}, row {i}")


def _class_names(features: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Classes and tags that are stored as numbers with names beside them, by name: F1 over spans reads B- and I-."""
    from datasets import ClassLabel

    names: dict[str, list[str]] = {}
    for column, feature in features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, ClassLabel) and inner.names:
            names[column] = inner.names

    def name(number: Any, known: list[str]) -> Any:
        if isinstance(number, list):
            return [name(n, known) for n in number]
        return known[number] if isinstance(number, int) and 0 <= number < len(known) else None  # -1: not told

    def change(values: dict[str, Any]) -> dict[str, Any]:
        return values | {c: name(values[c], known) for c, known in names.items()}

    return change


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
