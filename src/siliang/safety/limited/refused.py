"""The error of a limit, and errors as one line."""

from __future__ import annotations

from siliang.language import Bilingual, local


class LimitError(Exception):
    """More text, or more rules, than allowed; the message is bilingual."""

    def __init__(self, message: Bilingual) -> None:
        super().__init__(message)
        self.message = message


def both_texts(message: str) -> list[str]:
    """A message as JSON holds it: the English text and the Chinese one, which are the same for a library's message."""
    return [str(message), local(message, "zh")]


def error_line(error: BaseException) -> str:
    """The error's text, at most 1,000 characters; without a text, the name of its class."""
    return (str(error) or type(error).__name__)[:1000]
