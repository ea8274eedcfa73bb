"""A table of a few examples, or of their tokens. It needs neither `datasets` nor Arrow, which import pandas: that takes
half a second, which a prediction or the first step of a training would wait for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, overload

import numpy as np

from siliang.files import replacing

TokenColumns = dict[str, list[object]]  # the values of each column
NONE = -1  # the length of a list that is not there


class Lists(Sequence[list[Any] | None]):
    """A column of lists of numbers, kept as one array: an entry is a list, or None.

    Args:
        numbers: Of all lists.
        starts: Where each list begins in them.
        sizes: How long each list is; NONE of one that is not there.
    """

    def __init__(self, numbers: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> None:
        self.numbers, self.starts, self.sizes = numbers, starts, sizes

    @classmethod
    def of(cls, values: Sequence[object], kind: str) -> Self:
        """From lists; `kind` is what a number is."""
        lists = [list(value) if isinstance(value, Sequence) else None for value in values]
        sizes = np.array([NONE if value is None else len(value) for value in lists], np.int64)
        numbers = np.array([number for value in lists if value is not None for number in value], kind)
        return cls.behind_each_other(numbers, sizes)

    @classmethod
    def behind_each_other(cls, numbers: np.ndarray, sizes: np.ndarray) -> Self:
        """From the numbers of all lists, in order."""
        lengths = np.maximum(sizes, 0)
        return cls(numbers, np.cumsum(lengths) - lengths, sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, i: int) -> list[Any] | None: ...
    @overload
    def __getitem__(self, i: slice) -> Lists: ...
    def __getitem__(self, i: int | slice) -> list[Any] | Lists | None:
        if isinstance(i, slice):
            return Lists(self.numbers, self.starts[i], self.sizes[i])
        start, size = int(self.starts[i]), int(self.sizes[i])
        return None if size == NONE else self.numbers[start : start + size].tolist()

    def select(self, rows: Sequence[int]) -> Lists:
        """Some of the lists; their numbers stay where they are."""
        chosen = np.asarray(rows, np.int64)
        return Lists(self.numbers, self.starts[chosen], self.sizes[chosen])

    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of these lists, in order, and how long each list is."""
        lengths = np.maximum(self.sizes, 0)
        if len(self.numbers) == lengths.sum() and (self.starts == np.cumsum(lengths) - lengths).all():
            return self.numbers, lengths
        parts = [self.numbers[start : start + n] for start, n in zip(self.starts, lengths, strict=True)]
        return np.concatenate([self.numbers[:0], *parts]), lengths


Column = list[object] | Lists


@dataclass(frozen=True)
class SmallTable:
    """Has of `datasets.Dataset` what `TokenSet`, `ExampleSet` and the tasks use, with the same values.

    Attributes:
        columns: All of one length.
        features: For each, what a number is, as numpy names it; of text, `str`.
    """

    columns: Mapping[str, Column]
    features: dict[str, str]

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @overload
    def __getitem__(self, key: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, key: str) -> list[Any]: ...
    @overload
    def __getitem__(self, key: Sequence[int]) -> TokenColumns: ...
    def __getitem__(self, key: int | str | Sequence[int]) -> dict[str, Any] | list[Any] | TokenColumns:
        """A row, a column, or, of several rows, a list for each column."""
        if isinstance(key, str):
            return list(self.columns[key])
        if isinstance(key, Sequence):
            return {name: [values[i] for i in key] for name, values in self.columns.items()}
        return {name: values[key] for name, values in self.columns.items()}

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers."""
        return np.array(self.columns[name], self.features[name])

    def lists(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of a column of lists, one list after the other, and how long each list is."""
        values = self.columns[name]
        return (values if isinstance(values, Lists) else Lists.of(values, self.features[name])).flat()

    def compact(self, names: Sequence[str]) -> SmallTable:
        """The same with these columns of lists as arrays, an eighth of their size in memory."""
        lists = {name: Lists.of(self.columns[name], self.features[name]) for name in names}
        return SmallTable({**self.columns, **lists}, self.features)

    def select_columns(self, names: list[str]) -> SmallTable:
        return SmallTable({name: self.columns[name] for name in names}, self.features)

    def remove_columns(self, name: str) -> SmallTable:
        return self.select_columns([other for other in self.columns if other != name])

    def add_column(self, name: str, column: list[object], feature: str) -> SmallTable:
        return SmallTable({**self.columns, name: column}, {**self.features, name: feature})

    def select(self, rows: Sequence[int]) -> SmallTable:
        chosen: dict[str, Column] = {
            name: values.select(rows) if isinstance(values, Lists) else [values[i] for i in rows]
            for name, values in self.columns.items()
        }
        return SmallTable(chosen, self.features)

    # ---- a file of it ----

    def write(self, path: Path) -> None:
        """Into a file of arrays and JSON, from which `read` makes the same table."""
        arrays: dict[str, np.ndarray] = {}
        for name, values in self.columns.items():
            if isinstance(values, Lists):
                arrays[f"{name}.numbers"] = values.flat()[0]
                arrays[f"{name}.sizes"] = values.sizes
            else:
                arrays[f"{name}.json"] = np.frombuffer(json.dumps(values).encode(), np.uint8)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]

    @staticmethod
    def read(path: Path, features: dict[str, str]) -> SmallTable:
        """The table of a file.

        Raises:
            ValueError: The file is not of such a table.
        """
        columns: dict[str, Column] = {}
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            for name, kind in features.items():
                if f"{name}.json" in arrays.files:
                    values = json.loads(arrays[f"{name}.json"].tobytes().decode())
                    if not isinstance(values, list):
                        raise ValueError(f"{name} is no list")
                    columns[name] = values
                    continue
                numbers, sizes = arrays[f"{name}.numbers"], arrays[f"{name}.sizes"]
                lengths = np.maximum(sizes, 0)
                if numbers.dtype != kind or sizes.dtype != np.int64 or numbers.shape != (lengths.sum(),):
                    raise ValueError(f"{name} does not hold its lists")
                columns[name] = Lists.behind_each_other(numbers, sizes)
        if len({len(values) for values in columns.values()}) != 1:
            raise ValueError("the columns are not of one length")
        return SmallTable(columns, features)
