"""Reads rows from files, folders and the hub, one by one, each with the place it came from, so that a bad one can be
named and a file larger than memory can be read. A kind of file has one reader, wherever the file lies.
"""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from siliang.data.description import by_name, check_hub, check_saved, described
from siliang.data.json_stream import is_lines, json_lines, json_list
from siliang.data.reading import DataRow, Reading
from siliang.data.tables import clean_header, table_fields, whole_quoted
from siliang.data.tagged_words import tagged_rows
from siliang.data.text_files import COLUMN_FILES, FILE_KINDS, TextFile, find_text, kind_of
from siliang.files import is_pattern
from siliang.hub import unreachable
from siliang.language import Bilingual
from siliang.paths import check_links, near_names
from siliang.secrets import shortened
from siliang.types import DataError, first_line

TRAINED = ("train", "training")
HELD_OUT = ("test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")  # in the order of preference


@dataclass
class OpenedSource:
    """A source whose files are known.

    Attributes:
        parts: The files, or the saved table, of each part (train, test ...); a file or a pattern has one, "".
        named: The name that a file of the hub has in places and messages.
        features: What a data set's own description says of its columns.
    """

    source: str
    parts: dict[str, list[Path] | Any]
    named: dict[Path, str] = field(default_factory=dict)
    features: dict[str, Any] | None = None

    def part(self, split: str) -> str:
        """The name of a part: `train`, or what is held out, which goes by several names.

        Raises:
            DataError: There is no such part.
        """
        if "" in self.parts or split in self.parts:
            return split if split in self.parts else ""
        names = {"train": TRAINED, "test": HELD_OUT}.get(split, ())
        found = [name for name in names if name in self.parts]
        if not found and not self.parts:
            raise DataError(f"{self.source} holds no data: what it saved has no part.")
        if not found:
            apart = f" To read one of them, name its folder, such as {self.source}/{next(iter(self.parts))}."
            saved = not any(isinstance(files, list) for files in self.parts.values())
            raise DataError(
                f"{self.source} has no part {split!r}; it has {', '.join(self.parts)}.{apart if saved else ''}"
            )
        return found[0]

    def held_out(self) -> list[str]:
        """The parts that are for evaluation, the most suited first."""
        return [name for name in HELD_OUT if name in self.parts]

    def rows(self, part: str, reading: Reading) -> Iterator[DataRow]:
        """The rows of a part, in order; an unreadable one comes with its problem.

        Raises:
            DataError: It is damaged as a whole.
        """
        held = self.parts[part]
        if not isinstance(held, list):
            yield from _saved(held, self.source)
            return
        from siliang.data.arrow_rows import class_names

        changes = class_names(self.features)
        for file in held:
            for row in _file(file, self.named.get(file, str(file)), reading):
                for name, change in changes.items():
                    if name in row.values:
                        row.values[name] = change(row.values[name])
                yield row


def open_source(source: str, reading: Reading | None = None) -> OpenedSource:
    """Finds the files of a source.

    Args:
        source: A file, a pattern of files, a folder (from Dataset.save_to_disk, or of files, as a data set's repository
            is), or a name on the hub.
        reading: Hears of files that are left aside.

    Raises:
        DataError: There is no such source.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return OpenedSource(source, {"": [path]})
    if path.is_dir():
        return _folder(path, source, reading or Reading())
    if is_pattern(source) and (found := sorted(glob.glob(str(path), recursive=True))):  # noqa: PTH207 (absolute patterns)
        return OpenedSource(source, {"": [Path(name) for name in found if Path(name).is_file()]})
    if kind_of(path) in FILE_KINDS or source.startswith((".", "/", "~")) or source.strip("/").count("/") != 1:
        near = near_names(path)
        raise DataError(
            Bilingual(f"There is no data file or folder {source}.{near}", f"找不到数据文件或文件夹 {source}。{near.zh}")
        )
    return _hub(source)


# ---- files ----


def _file(path: Path, name: str, reading: Reading) -> Iterator[DataRow]:
    kind = kind_of(path)
    if kind not in FILE_KINDS:
        hint = " Save the sheet as .csv." if kind in (".xlsx", ".xls", ".ods") else ""
        raise DataError(
            f"{name}: {kind or 'no ending'} is not a kind of file that can be read.{hint} Allowed: "
            f"{', '.join(FILE_KINDS)}, or a folder from Dataset.save_to_disk."
        )
    try:
        if kind in (".parquet", ".arrow"):
            yield from _arrow(path, name, kind)
            return
        text = find_text(path, reading.encoding)
        if text.guessed:
            reading.note(
                Bilingual(
                    f"{name}: not UTF-8; read as {text.encoding} (data.encoding sets another)",
                    f"{name}：不是 UTF-8，按 {text.encoding} 读取（可用 data.encoding 指定）",
                )
            )
        if kind in (".csv", ".tsv"):
            yield from _table(text, kind, name, reading)
        elif kind in COLUMN_FILES or (kind == ".txt" and reading.tagged):
            yield from tagged_rows(text, name, reading)
        elif kind == ".txt":
            for n, line in text.lines():
                if reading.keeps_empty or line.strip():
                    yield DataRow({"text": line.rstrip("\r\n")}, f"{name}:{n}")
        else:
            # a file of the hub cannot be renamed
            lines = kind == ".jsonl" or (name != str(path) and is_lines(text))
            for where, value, problem in (json_lines if lines else json_list)(text, name):
                if problem is None and not isinstance(value, dict):
                    problem = f"must be an object with named fields, not {type(value).__name__}"
                elif problem is None and not value:
                    problem = "is empty: it has no fields"
                yield DataRow(value if problem is None else {}, where, problem)
    except (OSError, EOFError) as error:
        raise DataError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    except UnicodeDecodeError:  # the file has been changed since it was looked through
        raise DataError(f"{name} cannot be read: it is being written to.") from None


def _table(file: TextFile, kind: str, name: str, reading: Reading) -> Iterator[DataRow]:
    names = reading.header
    quoted = 0
    for line, fields, problem in table_fields(file, kind, names, reading.separator, name, reading.note):
        where = f"{name}:{line}"
        if problem is not None:
            yield DataRow({}, where, problem)
        elif names is None:
            if said := _is_no_header(fields):
                raise DataError(f"{where}: {said}")
            names = clean_header(fields, where)
        elif fields == names and names is reading.header and line == 1:
            raise DataError(f"{where}: is the header line that data.header says is missing: leave data.header out.")
        elif len(fields) != len(names):
            wanted = shortened(", ".join(names), 200)
            has = f"has {len(fields)} column{'s' if len(fields) != 1 else ''}, not {len(names)} ({wanted})"
            if kind == ".csv" and len(fields) > len(names):
                has += "; a cell with a comma, or whatever separates the columns, needs quotes"
            yield DataRow({}, where, has)
        else:
            quoted += kind == ".tsv" and any(map(whole_quoted, fields))
            yield DataRow(dict(zip(names, fields, strict=True)), where)
    if quoted:
        reading.doubts.append(
            Bilingual(
                f"{name}: {quoted:,} rows have a cell in double quotes, and the quotes are read as text",
                f"{name}：{quoted:,} 行有带双引号的单元格，引号按文本读取",
            )
        )


def _is_no_header(fields: list[str]) -> str | None:
    """What the first line of a table is in place of a header, if it shows."""
    first = fields[0].strip()
    if re.match(r"sep=", first, re.IGNORECASE) and len(fields) < 3:
        return "'sep=' is a mark of Excel's and no header line: take this line out; the separator is found without it."
    if first.startswith("#") and (len(fields) == 1 or first.startswith("# ")):
        return f"{shortened(first, 40)!r} is a comment and no header line: take it out."
    return None


def _arrow(path: Path, name: str, kind: str) -> Iterator[DataRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from siliang.data.arrow_rows import changes, rows_at_once, rows_of

    try:
        if kind == ".parquet":
            file = pq.ParquetFile(path)
            at_once = rows_at_once(file.metadata, path, name)
            # few rows at once: threads would cost more than they save
            schema, batches = file.schema_arrow, file.iter_batches(batch_size=at_once, use_threads=False)
        else:
            schema, batches = _arrow_batches(path)
        rows = rows_of(batches, changes(schema, name), name, path.stat().st_size)
        for number, values in enumerate(rows, start=1):
            yield DataRow(values, f"{name}, row {number}")
    except pa.ArrowException as error:
        raise DataError(f"{name} is not a readable {kind[1:]} file: {first_line(error)}") from None


def _arrow_batches(path: Path) -> tuple[Any, Iterator[Any]]:
    """Arrow's streams, which `datasets` writes, and its files, which have their table of contents at the end."""
    import pyarrow as pa

    mapped = pa.memory_map(str(path))
    try:
        stream = pa.ipc.open_stream(mapped)
        return stream.schema, iter(stream)
    except pa.ArrowInvalid:
        file = pa.ipc.open_file(mapped)
        return file.schema, (file.get_batch(i) for i in range(file.num_record_batches))


# ---- folders and the hub ----


def _folder(path: Path, source: str, reading: Reading) -> OpenedSource:
    """What Dataset.save_to_disk wrote, or files of data whose names, or whose README, say their part."""
    from datasets import load_from_disk

    check_links(path, DataError)
    saved = ("dataset_info.json", "dataset_dict.json")
    try:
        if any((path / name).is_file() for name in saved):
            check_saved(path)
            loaded: Any = load_from_disk(str(path))
            return OpenedSource(source, dict(loaded) if isinstance(loaded, dict) else {"": loaded})
        parts, features = described(path)
        return _only_ours(OpenedSource(source, parts or by_name(path), features=features), path, reading)
    except DataError:
        raise
    except Exception as error:  # `datasets` raises kinds of its own
        raise DataError(
            f"{path} holds no data: {first_line(error)}\n"
            "Name a file in it, a folder from Dataset.save_to_disk, or one of files such as train.jsonl and test.jsonl."
        ) from None


def _only_ours(opened: OpenedSource, path: Path, reading: Reading) -> OpenedSource:
    """Names the files of data that no part holds.

    Raises:
        DataError: There is no file of data.
    """
    root = path.resolve()
    kept = {part: [f for f in files if kind_of(f) in FILE_KINDS] for part, files in opened.parts.items()}
    opened.parts = {part: [path / f.relative_to(root) for f in files] for part, files in kept.items() if files}
    there = [f for f in sorted(path.rglob("*")) if f.is_file() and not f.name.startswith((".", "README"))]
    ours = [f for f in there if kind_of(f) in FILE_KINDS]
    if not opened.parts and ours:
        opened.parts = {"train": ours}
    if not opened.parts:
        raise DataError(
            f"{path} holds no data: no file of a kind that can be read ({', '.join(FILE_KINDS)}).\n"
            "Name a file in it, a folder from Dataset.save_to_disk, or one of files such as train.jsonl and test.jsonl."
        )
    taken = {file for files in opened.parts.values() for file in files}
    left = [f.relative_to(path).as_posix() for f in ours if f not in taken]
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        reading.note(f"{path}: not read, as their names say no part: {', '.join(left[:5])}{more}")
    return opened


def _hub(source: str) -> OpenedSource:
    from datasets import load_dataset_builder
    from datasets.config import HF_HUB_OFFLINE
    from datasets.packaged_modules.cache.cache import Cache

    name, _, config = source.partition(":")
    off = None if HF_HUB_OFFLINE else unreachable()  # where it is told to, `datasets` itself asks nobody
    try:
        _quieten()
        check_hub(name)
        if off is not None:
            last = name.rpartition("/")[2]
            builder: Any = Cache(None, last, config or None, repo_id=name, version="auto", hash="auto")
        else:
            builder = load_dataset_builder(name, config or None)
        if not builder.config.data_files:  # without a network, from what `datasets` made of it before
            builder.download_and_prepare()
            made: Any = builder.as_dataset()
            return OpenedSource(source, dict(made))
        parts, named = {}, {}
        for part, files in builder.config.data_files.items():
            parts[str(part)] = [_fetch(str(file), name) for file in files]
            named |= {
                path: f"{name}/{str(file).rpartition('@')[2].partition('/')[2] if '@' in str(file) else path.name}"
                for path, file in zip(parts[str(part)], files, strict=True)
            }
        return OpenedSource(source, parts, named, builder.info.features)
    except DataError:
        raise
    except Exception as error:  # the hub's client raises many kinds, all of which mean that the data is not to be had
        if off is not None:
            raise DataError(
                f"{source} is not a file or folder here, and not in the cache of `datasets`; {off}.\n"
                "Save the data to a file (.jsonl, .parquet) and name that."
            ) from None
        raise DataError(
            f"{source} is not a file or folder here, and the hub did not give it: {first_line(error)}\n"
            "Look at its name and at the network, or save the data to a file (.jsonl, .parquet) and name that."
        ) from None


def _fetch(file: str, name: str) -> Path:
    """A file of a data set of the hub, in the hub's cache."""
    from huggingface_hub import HfFileSystem, hf_hub_download

    if not file.startswith("hf://datasets/") or "::" in file:
        raise DataError(f"{name} names {file}, which is not in its repository.")
    found: Any = HfFileSystem().resolve_path(file)
    if (found.repo_type, found.repo_id) != ("dataset", name):
        raise DataError(f"{name} names {file}, which is not in its repository.")
    return Path(hf_hub_download(found.repo_id, found.path_in_repo, repo_type=found.repo_type, revision=found.revision))


def _quieten() -> None:
    """Bars are for people, and each of the client's attempts for nobody: the error says it once."""
    import logging

    from datasets import disable_progress_bars, enable_progress_bars

    (enable_progress_bars if sys.stderr.isatty() else disable_progress_bars)()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _saved(table: Any, source: str) -> Iterator[DataRow]:
    """The rows of a table from Dataset.save_to_disk."""
    from siliang.data.arrow_rows import changes, rows_of

    change, batches = changes(table.features.arrow_schema, source), table.with_format("arrow").iter(batch_size=1000)
    nbytes = sum(Path(file["filename"]).stat().st_size for file in table.cache_files)
    for number, values in enumerate(rows_of(batches, change, source, nbytes), start=1):
        yield DataRow(values, f"{source}, row {number}")
