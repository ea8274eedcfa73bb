"""Why others' code was stopped, and how an error is said in a line."""

from __future__ import annotations


class LimitError(Exception):
    """More text, or more rules, than is allowed."""


def error_line(error: BaseException) -> str:
    """The error's text, or its kind."""
    return (str(error) or type(error).__name__)[:1000]
