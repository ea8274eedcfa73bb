"""What the functions have in common: they print nothing, and an argument of another kind is an error in words."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

from siliang.data.example import Example
from siliang.language import Bilingual
from siliang.secrets import short_repr
from siliang.types import ConfigError

P = ParamSpec("P")
R = TypeVar("R")


def quietly(function: Callable[P, R]) -> Callable[P, R]:
    """The function without transformers' progress bars and notices, which are as they were when it ends."""

    @wraps(function)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> R:
        from transformers.utils import logging

        bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        try:
            return function(*args, **kwargs)
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()

    return quiet


def as_path(value: object, name: str, what: str) -> str:
    """A path as text.

    Args:
        name: Of the argument.
        what: It is, in both languages.

    Raises:
        ConfigError: It is no path.
    """
    if not isinstance(value, str | os.PathLike):
        raise wrong_kind(value, name, what)
    return os.fsdecode(value)


def as_text(value: object, name: str) -> str:
    """
    Raises:
        ConfigError: It is no text.
    """
    if not isinstance(value, str):
        raise wrong_kind(value, name, Bilingual("a text", "一段文本"))
    return value


def as_inputs(inputs: object) -> Iterator[str | tuple[str, ...] | Example]:
    """What is to be predicted, one by one. A text alone is one text, and a list of words is a tuple of them.

    Raises:
        ConfigError: One is no text, pair of texts, or words.
    """
    several = Bilingual(
        "texts, pairs of texts, or the words of sentences, in a list", "由文本、文本对或句子的各个词组成的列表"
    )
    if isinstance(inputs, str):
        inputs = [inputs]
    if not isinstance(inputs, Iterable) or isinstance(inputs, bytes | dict):
        raise wrong_kind(inputs, "inputs", several)
    each: Iterable[object] = inputs
    for number, one in enumerate(each):
        parts: Sequence[object] = one if isinstance(one, list | tuple) else ()
        words = tuple(part for part in parts if isinstance(part, str))
        if isinstance(one, str | Example):
            yield one
        elif words and len(words) == len(parts):
            yield words
        else:
            what = Bilingual("a text, a pair of texts, or a list of words", "一段文本、一对文本，或词的列表")
            raise wrong_kind(one, f"inputs[{number}]", what)


def wrong_kind(value: object, name: str, what: str) -> ConfigError:
    """The error of an argument of another kind."""
    shown, kind = short_repr(value), type(value).__name__
    wanted = what if isinstance(what, Bilingual) else Bilingual(what, what)
    return ConfigError(
        Bilingual(
            f"{name} = {shown} ({kind}): must be {wanted}.",
            f"{name} = {shown}（{kind}）：应为{wanted.zh}。",
        )
    )
