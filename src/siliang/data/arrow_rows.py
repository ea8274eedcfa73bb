"""Rows of Arrow tables as they were written: what only the table's form added to them is taken off again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from siliang.data.numbers import is_whole
from siliang.data.text_files import MOST_COLUMNS, MOST_ROW
from siliang.language import Bilingual, local
from siliang.safety.safe_json import JsonError, parse_json
from siliang.secrets import shortened
from siliang.types import DataError, first_line

if TYPE_CHECKING:  # slow to import
    import pyarrow.parquet as pq

Change = Callable[[object], object]  # of a cell
# A small file may hold a text once and name it in every row, or say that a list has a billion nulls. So:
MOST_ROWS, FEWEST_ROWS = 1000, 16  # are unpacked at once
UNPACKED_BYTES = 2**28  # that they may have
MOST_UNPACKED = 50  # bytes of columns per byte of a parquet file, beyond SMALL_BYTES
SMALL_BYTES = 16 * 2**20
MOST_GROWTH = 1000  # values and characters of all rows for each byte of the file, beyond MOST_SMALL
MOST_SMALL = 64 * 2**20
MOST_AT_ONCE = 2**22  # values, and characters, that are made Python's at once


def rows_of(
    batches: Iterable[pa.RecordBatch | pa.Table], change: dict[str, Change], name: object, nbytes: int
) -> Iterator[dict[str, object]]:
    """The rows of record batches or tables.

    Args:
        change: What `changes` gave for their schema.
        name: Of the source, for the error.
        nbytes: Of the source's files.

    Raises:
        DataError: A row has too many values or characters, all of them have far more than the files, or a batch is
            damaged.
    """
    size = 0
    for batch in batches:
        try:
            batch.validate(full=True)  # of a mapped file nobody has looked whether its places are in it
        except pa.ArrowInvalid as error:
            raise DataError(
                Bilingual(f"{name} is damaged: {first_line(error)}", f"{name} 已损坏：{local(first_line(error), 'zh')}")
            ) from None
        size += _size(batch.columns)
        if size > MOST_SMALL + MOST_GROWTH * nbytes:
            raise DataError(
                Bilingual(
                    f"{name}: its rows have more than {MOST_GROWTH:,} times the characters of the file.",
                    f"{name}：展开后的样本超过文件字符数的 {MOST_GROWTH:,} 倍。",
                )
            )
        yield from _rows(batch, change, name)


def _rows(batch: pa.RecordBatch | pa.Table, change: dict[str, Change], name: object) -> Iterator[dict[str, object]]:
    size = _size(batch.columns)
    if size > (MOST_AT_ONCE if batch.num_rows > 1 else MOST_ROW):
        if batch.num_rows == 1:
            raise DataError(
                Bilingual(
                    f"{name}: a row has {size:,} values and characters: at most {MOST_ROW:,} are read.",
                    f"{name}：有一行含 {size:,} 个值和字符：最多读取 {MOST_ROW:,} 个。",
                )
            )
        half = batch.num_rows // 2
        yield from _rows(batch.slice(0, half), change, name)
        yield from _rows(batch.slice(half), change, name)
        return
    for values in batch.to_pylist():
        for column, function in change.items():
            if column in values:
                values[column] = function(values[column])
        yield values


def rows_at_once(metadata: pq.FileMetaData, path: Path, name: str) -> int:
    """How many rows of a parquet file may be decompressed at once. One stored text can be the value of every row; it is
    no larger than its column.

    Raises:
        DataError: The file's columns are much larger than the file.
    """
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    sizes = [group.column(i).total_uncompressed_size for group in groups for i in range(metadata.num_columns)]
    if sum(sizes) > SMALL_BYTES + MOST_UNPACKED * path.stat().st_size:
        raise DataError(
            Bilingual(
                f"{name} unpacks to {sum(sizes):,} bytes, more than {MOST_UNPACKED} times its size: write it without "
                "compression.",
                f"{name} 解压后有 {sum(sizes):,} 字节，超过自身大小的 {MOST_UNPACKED} 倍：请存为不压缩的文件。",
            )
        )
    return min(MOST_ROWS, max(FEWEST_ROWS, UNPACKED_BYTES // max([1, *sizes])))


def _size(arrays: Iterable[pa.Array | pa.ChunkedArray]) -> int:
    """Values and bytes of text that Python would hold of columns; a text or value counts as often as it is named."""
    size = 0
    for array in arrays:
        kind = array.type
        size += len(array)
        for piece in array.chunks if isinstance(array, pa.ChunkedArray) else [array]:
            if isinstance(piece, pa.ExtensionArray):
                size += _size([piece.storage])
            elif pa.types.is_dictionary(kind):
                words = piece.dictionary
                if _is_text(kind.value_type):
                    size += _total(_lengths(words).take(piece.indices.drop_null()))
                elif pa.types.is_nested(kind.value_type):
                    size += len(piece) * _size([words])
            elif pa.types.is_struct(kind):
                size += _size(piece.field(i) for i in range(kind.num_fields))
            elif _is_list(kind):
                size += _size([piece.flatten()])
            elif pa.types.is_map(kind):
                first, last = (piece.offsets[i].as_py() for i in (0, len(piece)))
                size += _size(part.slice(first, last - first) for part in (piece.keys, piece.items))
            elif _is_text(kind):
                size += _total(_lengths(piece))
    return size


def _lengths(texts: pa.Array) -> pa.Array:
    return pc.call_function("binary_length", [texts])


def _total(numbers: pa.Array) -> int:
    return pc.call_function("sum", [numbers]).as_py() or 0


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


# A value of these types may expand to any number of values; programs do not write training data with them.
NOT_READ = ("is_run_end_encoded", "is_union", "is_list_view", "is_large_list_view", "is_string_view", "is_binary_view")


def _not_read(kind: pa.DataType) -> pa.DataType | None:
    """The unsupported type within `kind`, or `kind` itself; None if all types are supported."""
    if any(getattr(pa.types, name)(kind) for name in NOT_READ):
        return kind
    if isinstance(kind, pa.BaseExtensionType):
        inner = [kind.storage_type]
    elif pa.types.is_dictionary(kind):
        inner = [kind.value_type]
    else:
        inner = [kind.field(i).type for i in range(kind.num_fields)]
    return next((found for part in inner if (found := _not_read(part)) is not None), None)


def changes(schema: pa.Schema, name: object) -> dict[str, Change]:
    """By column, what makes its cells again what was written into them.

    An object of a table has the fields of all objects of its column, null where it has none of that name: these are
    taken off. A 32-bit number gets the digits that it has, classes with names come by name, JSON is read, a mapping is
    one, and text that is stored as bytes is text.

    Args:
        name: Of the source, for the error.

    Raises:
        DataError: Two columns have one name, there are too many, or one is of a type that is not read.
    """
    if len(schema) > MOST_COLUMNS:
        raise DataError(
            Bilingual(
                f"{name} has {len(schema):,} columns: at most {MOST_COLUMNS:,} are read.",
                f"{name} 有 {len(schema):,} 列：最多读取 {MOST_COLUMNS:,} 列。",
            )
        )
    seen: set[str] = set()
    for field in schema:
        if field.name in seen:
            raise DataError(
                Bilingual(
                    f"{name} has the column {shortened(field.name, 100)!r} twice; give each its own name.",
                    f"{name} 有两列都叫 {shortened(field.name, 100)!r}：请给各列不同的列名。",
                )
            )
        seen.add(field.name)
        if (kind := _not_read(field.type)) is not None:
            raise DataError(
                Bilingual(
                    f"{name}: the column {shortened(field.name, 100)!r} holds the type {kind}, which is not read.",
                    f"{name}：列 {shortened(field.name, 100)!r} 的类型是 {kind}，无法读取。",
                )
            )
    features = _features(schema)
    found = {field.name: _change(field.type, features.get(field.name)) for field in schema}
    return {name: change for name, change in found.items() if change is not None}


def class_names(features: Mapping[str, object] | None) -> dict[str, Change]:
    """The same for rows of other kinds of files, of which a data set's description says that a column holds classes by
    number: "1" or 1 to its name."""
    found: dict[str, Change] = {}
    for name, feature in (features or {}).items():
        if names := getattr(feature, "names", None):
            found[name] = lambda value, names=names: _name(
                int(value) if isinstance(value, str) and is_whole(value) else value, names
            )
    return found


def _features(schema: pa.Schema) -> dict[str, object]:
    """The features of `datasets` for the columns; empty if it does not know the types."""
    from datasets import Features

    if b"huggingface" not in (schema.metadata or {}):
        return {}
    try:
        return dict(Features.from_arrow_schema(schema))
    except Exception:  # `datasets` has many exception classes for files of other programs or later versions
        return {}


def _change(kind: pa.DataType, feature: object) -> Change | None:
    """None: the cell is right as it is."""
    if names := getattr(feature, "names", None):
        return lambda value: _name(value, names)
    if type(feature).__name__ == "Json" or type(kind).__name__ == "JsonType":
        return _parsed
    if isinstance(kind, pa.BaseExtensionType):
        return _change(kind.storage_type, None)
    if pa.types.is_dictionary(kind):
        return _change(kind.value_type, feature)
    if pa.types.is_struct(kind):
        return _of_struct(kind, feature)
    if pa.types.is_map(kind):
        key, item = (_change(part, None) or _same for part in (kind.key_type, kind.item_type))
        return lambda value: {key(k): item(v) for k, v in value} if isinstance(value, list) else value
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _change(kind.value_type, _inner(feature))
        return inner and (lambda value: [inner(item) for item in value] if isinstance(value, list) else value)
    if pa.types.is_float32(kind):
        return lambda value: _shortest(value) if isinstance(value, float) else value
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _text
    return None


def _of_struct(kind: pa.StructType, feature: object) -> Change:
    inner = getattr(feature, "feature", feature)
    known = inner if isinstance(inner, dict) else {}
    parts = {field.name: _change(field.type, known.get(field.name)) or _same for field in kind}

    def change(value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {name: parts[name](held) for name, held in value.items() if held is not None}

    return change


def _inner(feature: object) -> object:
    if isinstance(feature, list):
        return feature[0] if feature else None
    return getattr(feature, "feature", None)


def _same(value: object) -> object:
    return value


def _name(number: object, known: list[str]) -> object:
    if isinstance(number, int):
        return known[number] if 0 <= number < len(known) else None  # -1: unknown
    return number


def _shortest(value: float) -> float:
    """0.1 as a 32-bit number is 0.10000000149011612 as one of 64 bits."""
    import numpy as np

    return float(str(np.float32(value)))


def _parsed(value: object) -> object:
    """A cell of JSON; one that is none stays text, which the row's layout will refuse."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, foreign=True)
    except JsonError:
        return value


def _text(value: object) -> object:
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value
