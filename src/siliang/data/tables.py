"""Files of separated values: which separator, whether quotes are marks or text, and the rows."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from siliang.data.text_files import INVISIBLE, MOST_COLUMNS, MOST_ROW, TextFile
from siliang.language import Bilingual, local
from siliang.secrets import shortened
from siliang.types import DataError

SEPARATORS = {
    ",": Bilingual("a comma", "逗号"),
    "\t": Bilingual("a tab", "制表符"),
    ";": Bilingual("a semicolon", "分号"),
    "|": Bilingual("a bar", "竖线"),
}
SAMPLE_LINES = 200
CONSISTENT = 0.9  # of the first records: as many fields as the header, where a separator is certain

Fields = tuple[int, list[str], str | None]  # number of the first line, the fields, what is wrong


def table_fields(
    file: TextFile, kind: str, header: list[str] | None, separator: str, name: str | Path, note: Callable[[str], None]
) -> Iterator[Fields]:
    """The records of a .csv or .tsv file, its header line among them.

    A .tsv file is text between tabs, where a quote is a quote (SST-2 and its kind have unpaired ones), unless the whole
    file can only have been written with quotes as marks. A .csv file, and every file whose separator is given or is not
    that of its kind, has quotes as marks.

    Args:
        note: Is called with a line on what was guessed.
    """
    csv.field_size_limit(MOST_ROW)
    own = "\t" if kind == ".tsv" else ","
    found = separator if separator != "auto" else _separator(file, own, header)
    marks = separator != "auto" or found == ","
    if separator == "auto" and found != own:
        by = SEPARATORS[found]
        note(
            Bilingual(
                f"{name}: its columns are separated by {by} (data.separator sets another)",
                f"{name}：列以{by.zh}分隔（可用 data.separator 指定）",
            )
        )
        marks = True
    elif not marks:
        marks = _quotes_are_marks(file, found)
        if marks:
            note(
                Bilingual(
                    f"{name}: its cells are quoted as in a csv file, and are read so",
                    f"{name}：单元格像 csv 文件那样加了引号，按此读取",
                )
            )
    quoting = csv.QUOTE_MINIMAL if marks else csv.QUOTE_NONE
    reader = csv.reader((line for _, line in file.lines()), strict=True, delimiter=found, quoting=quoting)
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            why = _reason(str(error), reader.line_num - first)
            yield (
                first,
                [],
                Bilingual(f"not readable as {kind[1:]}: {why}", f"不是可读的 {kind[1:]}：{local(why, 'zh')}"),
            )
            continue
        if fields:
            yield first, fields, None


def clean_header(fields: list[str], where: str) -> list[str]:
    """The column names of a header line, without blanks and invisible characters around them.

    Raises:
        DataError: A name is there twice, or there are too many.
    """
    if len(fields) > MOST_COLUMNS:
        raise DataError(
            Bilingual(
                f"{where}: the header has {len(fields):,} columns: at most {MOST_COLUMNS:,} are read.",
                f"{where}：标题行有 {len(fields):,} 列：最多读取 {MOST_COLUMNS:,} 列。",
            )
        )
    names = [field.strip(INVISIBLE + " \t\r\n\xa0\u3000") for field in fields]
    seen: set[str] = set()
    for i, name in enumerate(names):
        if not name and "" in seen:
            names[i] = f"column {i + 1}"
        elif name and name in seen:
            raise DataError(
                Bilingual(
                    f"{where}: the header names the column {shortened(name, 100)!r} twice; give each column "
                    "its own name.",
                    f"{where}：标题行有两列都叫 {shortened(name, 100)!r}：请给各列不同的列名。",
                )
            )
        seen.add(names[i])
    return names


def whole_quoted(field: str) -> bool:
    """Whether the whole cell is in double quotes."""
    return len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', "")


def _reason(error: str, lines: int) -> str:
    if error == "unexpected end of data":
        lost, lost_zh = "", ""
        if lines:
            lost, lost_zh = f", and the {lines:,} lines behind it are lost with it", f"，后面的 {lines:,} 行也因此丢失"
        return Bilingual(f"a quote that opens in this line closes nowhere{lost}", f"这一行打开的引号没有闭合{lost_zh}")
    if error.startswith("new-line character seen in unquoted field"):
        return Bilingual("a carriage return inside of a cell without quotes", "没有引号的单元格中有回车符")
    return error


def _separator(file: TextFile, own: str, header: list[str] | None) -> str:
    """The kind's own, unless the first record is one field with it, and several with exactly one other that also fits
    the records behind it."""
    lines = [line for _, line in islice(file.lines(), SAMPLE_LINES)]
    suited = []
    for separator in (own, *(s for s in SEPARATORS if s != own)):
        records = _records(lines, separator)
        if len(lines) == SAMPLE_LINES:
            records = records[:-1]  # it may continue after the sample
        wanted = len(header) if header is not None else len(records[0]) if records else 1
        fitting = sum(len(fields) == wanted for fields in records)
        if wanted > 1 and fitting >= CONSISTENT * len(records) and records and len(records[0]) == wanted:
            suited.append(separator)
        if separator == own and records and (suited or len(records[0]) > 1):
            return own
    return suited[0] if len(suited) == 1 else own


def _records(lines: list[str], separator: str) -> list[list[str]]:
    """The records up to the first that cannot be read."""
    found: list[list[str]] = []
    with suppress(csv.Error):
        found += (fields for fields in csv.reader(lines, delimiter=separator) if fields)
    return found


def _quotes_are_marks(file: TextFile, separator: str) -> bool:
    """Whether a file reads without a fault where quotes are marks, and has cells that can only have been written so:
    with a tab or a line break in them, with doubled quotes, or every one of them quoted."""
    if not any('"' in line for _, line in file.lines()):
        return False
    proof, plain, width = False, False, 0
    try:
        records = csv.reader((line for _, line in file.lines()), delimiter=separator, strict=True)
        for fields in records:
            if not fields:
                continue
            width = width or len(fields)
            if len(fields) != width:
                return False
            proof = proof or any(separator in field or "\n" in field or "\r" in field for field in fields)
    except csv.Error:
        return False
    for _, line in file.lines():
        for field in line.rstrip("\r\n").split(separator):
            quoted = whole_quoted(field)
            proof = proof or (quoted and '""' in field[1:-1])
            plain = plain or (bool(field) and not quoted)
    return proof or not plain
