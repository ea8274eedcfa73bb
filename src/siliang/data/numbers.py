"""Texts that are numbers."""

from __future__ import annotations

import re


def is_whole(text: str) -> bool:
    """A whole number in plain digits: of "①", "²" and "--5" Python's isdigit and int say different things."""
    return re.fullmatch(r"-?[0-9]{1,18}", text) is not None


def as_number(text: str) -> float | None:
    """The number that a text is, if it is a finite one: Python's float takes "1_000" and "nan", too."""
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", text):
        return None
    number = float(text)
    return number if abs(number) != float("inf") else None
