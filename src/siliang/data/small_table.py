"""A table of the tokens of a few examples. It needs neither `datasets` nor Arrow, which import pandas: that takes half
a second, which a prediction would wait for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

TokenColumns = dict[str, list[object]]  # the values of each column


@dataclass(frozen=True)
class SmallTable:
    """Has of `datasets.Dataset` what `TokenSet` and the tasks use, with the same values.

    Attributes:
        columns: A list for each, all of one length.
        features: For each, what a number is, as numpy names it; of text, `str`.
    """

    columns: TokenColumns
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
            return self.columns[key]
        if isinstance(key, Sequence):
            return self.select(key).columns
        return {name: values[key] for name, values in self.columns.items()}

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers."""
        return np.array(self.columns[name], self.features[name])

    def lists(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of a column of lists, one list after the other, and how long each list is."""
        lists = [values if isinstance(values, Sequence) else [] for values in self.columns[name]]
        flat = [number for values in lists for number in values]
        return np.array(flat, self.features[name]), np.array([len(values) for values in lists], np.int64)

    def select_columns(self, names: list[str]) -> SmallTable:
        return SmallTable({name: self.columns[name] for name in names}, self.features)

    def remove_columns(self, name: str) -> SmallTable:
        return self.select_columns([other for other in self.columns if other != name])

    def add_column(self, name: str, column: list[object], feature: str) -> SmallTable:
        return SmallTable({**self.columns, name: column}, {**self.features, name: feature})

    def select(self, rows: Sequence[int]) -> SmallTable:
        return SmallTable({name: [values[i] for i in rows] for name, values in self.columns.items()}, self.features)
