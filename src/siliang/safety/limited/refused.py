"""The error of a limit, and errors as one line."""

from __future__ import annotations


class LimitError(Exception):
    """More text, or more rules, than allowed."""


def error_line(error: BaseException) -> str:
    """The error's text, at most 1,000 characters; without a text, the name of its class."""
    return (str(error) or type(error).__name__)[:1000]
