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


def has_decimal_comma(text: str) -> bool:
    """Whether a text is a number with a comma for its decimal point, as "3,5"; "1,234" may be one, or 1234."""
    return re.fullmatch(r"[+-]?[0-9]{1,18},[0-9]{1,18}", text) is not None


def has_thousands(text: str) -> bool:
    """Whether a text can only be a number with a separator of thousands, as "1.369,9", "1,369.9" and "1.369.000"."""
    groups = r"(\.[0-9]{3})+,[0-9]+|(,[0-9]{3})+\.[0-9]+|(\.[0-9]{3}){2,}"
    return re.fullmatch(rf"[+-]?[0-9]{{1,3}}({groups})", text) is not None


def has_comma_groups(text: str) -> bool:
    """Whether a text may be a number with commas between its thousands, as "1,234,567", or three labels."""
    return re.fullmatch(r"[+-]?[1-9][0-9]{0,2}(,[0-9]{3}){2,}", text) is not None


def with_point(text: str) -> str:
    """A number with a decimal comma as one with a point; another text, and one that may be 1234, as it is."""
    if not has_decimal_comma(text) or re.fullmatch(r"[+-]?[1-9][0-9]{0,2},[0-9]{3}", text):
        return text
    return text.replace(",", ".")
