"""The rows of one file, by its kind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from siliang.data.json_stream import is_lines, json_lines, json_list
from siliang.data.list_cells import csv_cell
from siliang.data.reading import DataRow, Reading
from siliang.data.tables import clean_header, table_fields, whole_quoted
from siliang.data.tagged_words import tagged_rows
from siliang.data.text_files import COLUMN_FILES, FILE_KINDS, TextFile, find_text, kind_of
from siliang.language import Bilingual, local, together
from siliang.secrets import shortened
from siliang.types import DataError, first_line

if TYPE_CHECKING:  # slow to import
    import pyarrow as pa


def rows_of_file(path: Path, name: str, reading: Reading) -> Iterator[DataRow]:
    """Reads them one by one.

    Args:
        name: The file's name in places and messages.

    Raises:
        DataError: It is of no kind that can be read, or damaged.
    """
    kind = kind_of(path)
    if kind not in FILE_KINDS:
        is_sheet = kind in (".xlsx", ".xls", ".ods")
        hint = Bilingual(" Save the sheet as .csv.", "请把表格另存为 .csv。") if is_sheet else Bilingual("", "")
        raise DataError(
            Bilingual(
                f"{name}: {kind or 'no ending'} is not a kind of file that can be read.{hint} Allowed: "
                f"{', '.join(FILE_KINDS)}, or a folder from Dataset.save_to_disk.",
                f"{name}：不能读取 {kind or '没有扩展名'} 的文件。{hint.zh}可用："
                f"{'、'.join(FILE_KINDS)}，或 Dataset.save_to_disk 写的文件夹。",
            )
        )
    try:
        if kind in (".parquet", ".arrow"):
            yield from _arrow(path, name, kind, reading)
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
                yield _object(where, value, problem)
    except (OSError, EOFError) as error:
        raise DataError(
            Bilingual(
                f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.",
                f"{name} 无法读取：{getattr(error, 'strerror', None) or error}。",
            )
        ) from None
    except UnicodeDecodeError:  # the file has been changed since it was looked through
        raise DataError(
            Bilingual(f"{name} cannot be read: it is being written to.", f"{name} 无法读取：它正在被写入。")
        ) from None


def _object(where: str, value: object, problem: str | None) -> DataRow:
    """An item of a JSON file as a row, which has fields."""
    if problem is None and not isinstance(value, dict):
        kind = type(value).__name__
        problem = Bilingual(f"must be an object with named fields, not {kind}", f"应为带字段名的对象，而不是 {kind}")
    elif problem is None and not value:
        problem = Bilingual("is empty: it has no fields", "是空的：没有字段")
    return DataRow(value if problem is None and isinstance(value, dict) else {}, where, problem)


def _table(file: TextFile, kind: str, name: str, reading: Reading) -> Iterator[DataRow]:
    names = reading.header
    quoted = 0
    for line, fields, problem in table_fields(file, kind, names, reading.separator, name, reading.note):
        where = f"{name}:{line}"
        if problem is not None:
            yield DataRow({}, where, problem)
        elif names is None:
            if problem := _is_no_header(fields):
                raise DataError(Bilingual(f"{where}: {problem}", f"{where}：{local(problem, 'zh')}"))
            names = clean_header(fields, where)
            reading.add_columns(names)
        elif fields == names and names is reading.header and line == 1:
            raise DataError(
                Bilingual(
                    f"{where}: is the header line that data.header says is missing: leave data.header out.",
                    f"{where}：这是标题行，而 data.header 表示文件没有标题行：请去掉 data.header。",
                )
            )
        elif len(fields) != len(names):
            wanted = shortened(", ".join(names), 200)
            n = len(fields)
            has = Bilingual(
                f"has {n} column{'s' if n != 1 else ''}, not {len(names)} ({wanted})",
                f"有 {n} 列，应为 {len(names)} 列（{wanted}）",
            )
            if kind == ".csv" and len(fields) > len(names):
                has = together(
                    has,
                    Bilingual(
                        "; a cell with a comma or another column separator needs quotes",
                        "；单元格中含有逗号或其他列分隔符时要加引号",
                    ),
                )
            yield DataRow({}, where, has)
        else:
            quoted += kind == ".tsv" and any(map(whole_quoted, fields))
            yield DataRow(dict(zip(names, map(csv_cell, fields), strict=True)), where)
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
        return Bilingual(
            "'sep=' is a mark of Excel's and no header line: take this line out; the separator is found without it.",
            "'sep=' 是 Excel 的标记，不是标题行：请去掉这一行，分隔符会自动识别。",
        )
    if first.startswith("#") and (len(fields) == 1 or first.startswith("# ")):
        line = shortened(first, 40)
        return Bilingual(
            f"{line!r} is a comment, not a header line: remove it.", f"{line!r} 是注释，不是标题行：请去掉。"
        )
    return None


def _arrow(path: Path, name: str, kind: str, reading: Reading) -> Iterator[DataRow]:
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
        reading.add_columns(schema.names)
        rows = rows_of(batches, changes(schema, name), name, path.stat().st_size)
        for number, values in enumerate(rows, start=1):
            yield DataRow(values, f"{name}, row {number}")
    except pa.ArrowException as error:
        raise DataError(
            Bilingual(
                f"{name} is not a readable {kind[1:]} file: {first_line(error)}",
                f"{name} 不是可读的 {kind[1:]} 文件：{local(first_line(error), 'zh')}",
            )
        ) from None


def _arrow_batches(path: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Arrow's streams, which `datasets` writes, and its files, which have their table of contents at the end."""
    import pyarrow as pa

    mapped = pa.memory_map(str(path))
    try:
        stream = pa.ipc.open_stream(mapped)
        return stream.schema, iter(stream)
    except pa.ArrowInvalid:
        file = pa.ipc.open_file(mapped)
        return file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
