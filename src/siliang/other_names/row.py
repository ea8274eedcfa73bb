"""One name of another tool, and how a value is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One of siliang's settings, or what siliang does in place of a setting.

    Attributes:
        setting: Its dotted name; empty where there is none.
        names: What others call it.
        example: A value that is good for it, as for --set.
        values: What is written otherwise here: the others' value, and the assignments that say it. A value of None
            means: nothing has to be set. With `values`, others than these are not values of the setting, unless
            `any_value`.
        any_value: Values that are not in `values` are used unchanged.
        note: What else is to be known, a sentence.
        lacks: Others' values that siliang has nothing for, and why, of each.
    """

    setting: str
    names: tuple[str, ...]
    example: str = ""
    values: Mapping[str, str | None] = field(default_factory=dict)
    any_value: bool = True
    note: str = ""
    lacks: Mapping[str, str] = field(default_factory=dict)


def row(setting: str, names: str, example: str = "", **more: Any) -> Row:
    """A setting; `names` are written with spaces between them."""
    return Row(setting, tuple(names.split()), example, **more)


def nothing(names: str, note: str) -> Row:
    """What is not a setting here."""
    return Row("", tuple(names.split()), note=note)
