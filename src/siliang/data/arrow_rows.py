"""Rows of Arrow tables as they were written: what only the table's form added to them is taken off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from siliang.data.numbers import is_whole
from siliang.safe_json import JsonError, parse_json
from siliang.types import DataError

Change = Callable[[Any], Any]


def rows_of(batch: Any, change: dict[str, Change]) -> Iterator[dict[str, Any]]:
    """The rows of a record batch or table.

    Args:
        change: What `changes` gave for its schema.
    """
    for values in batch.to_pylist():
        for name, function in change.items():
            if name in values:
                values[name] = function(values[name])
        yield values


def changes(schema: pa.Schema, name: object) -> dict[str, Change]:
    """By column, what makes its cells again what was written into them.

    An object of a table has the fields of all objects of its column, null where it has none of that name: these are
    taken off. A 32-bit number gets the digits that it has, classes with names come by name, JSON is read, a mapping is
    one, and text that is stored as bytes is text.

    Args:
        name: Of the source, for the error.

    Raises:
        DataError: Two columns have one name.
    """
    if twice := [column for i, column in enumerate(schema.names) if column in schema.names[:i]]:
        raise DataError(f"{name} has the column {twice[0]!r} twice; give each column its own name.")
    features = _features(schema)
    found = {field.name: _change(field.type, features.get(field.name)) for field in schema}
    return {name: change for name, change in found.items() if change is not None}


def class_names(features: dict[str, Any] | None) -> dict[str, Change]:
    """The same for rows of other kinds of files, of which a data set's description says that a column holds classes by
    number: "1" or 1 to its name."""
    found = {}
    for name, feature in (features or {}).items():
        if names := getattr(feature, "names", None):
            found[name] = lambda value, names=names: _name(
                int(value) if isinstance(value, str) and is_whole(value) else value, names
            )
    return found


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, str) and is_whole(value) else value


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What `datasets` says of the columns beside their types; nothing where it knows the types not."""
    from datasets import Features

    if b"huggingface" not in (schema.metadata or {}):
        return {}
    try:
        return dict(Features.from_arrow_schema(schema))
    except Exception:  # `datasets` raises kinds of its own for what other programs, or later ones, have written
        return {}


def _change(kind: Any, feature: Any) -> Change | None:
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
        return lambda value: None if value is None else {key(k): item(v) for k, v in value}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _change(kind.value_type, _inner(feature))
        return None if inner is None else (lambda value: None if value is None else [inner(item) for item in value])
    if pa.types.is_float32(kind):
        return lambda value: None if value is None else _shortest(value)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _text
    return None


def _of_struct(kind: Any, feature: Any) -> Change:
    inner = getattr(feature, "feature", feature)
    known = inner if isinstance(inner, dict) else {}
    parts = {field.name: _change(field.type, known.get(field.name)) or _same for field in kind}

    def change(value: Any) -> Any:
        return value and {name: parts[name](held) for name, held in value.items() if held is not None}

    return change


def _inner(feature: Any) -> Any:
    if isinstance(feature, list):
        return feature[0] if feature else None
    return getattr(feature, "feature", None)


def _same(value: Any) -> Any:
    return value


def _name(number: Any, known: list[str]) -> Any:
    if isinstance(number, int):
        return known[number] if 0 <= number < len(known) else None  # -1: not told
    return number


def _shortest(value: float) -> float:
    """0.1 as a 32-bit number is 0.10000000149011612 as one of 64 bits."""
    import numpy as np

    return float(str(np.float32(value)))


def _parsed(value: Any) -> Any:
    """A cell of JSON; one that is none stays text, which the row's layout will refuse."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, foreign=True)
    except JsonError:
        return value


def _text(value: Any) -> Any:
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value
