"""What the functions have in common: they print nothing, and an argument of another kind is an error in words."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

from siliang.argument_kinds import check_kinds, wrong_kind
from siliang.data.example import Example
from siliang.data.json_stream import half_a_character
from siliang.environment import bound_kernel_caches
from siliang.language import Bilingual, local
from siliang.secrets import short_repr
from siliang.types import DataError

P = ParamSpec("P")
R = TypeVar("R")


def quietly(function: Callable[P, R]) -> Callable[P, R]:
    """The function with arguments of the kinds that it takes, as the command runs it: without transformers' progress
    bars and notices, which are as they were when it ends, and with oneDNN's caches of kernels bounded. These stay
    bounded in the process, if it has computed no product before, and in those that it starts."""
    signature = inspect.signature(function)
    changes = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

    @wraps(function)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # whose own TypeError names it
        own = {name: value for name, value in bound.arguments.items() if name != changes}
        bound.arguments.update(check_kinds(function, own))
        bound_kernel_caches()
        from transformers.utils import logging

        bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        try:
            return function(*bound.args, **bound.kwargs)
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
        DataError: It holds half of a character.
    """
    if not isinstance(value, str):
        raise wrong_kind(value, name, Bilingual("a text", "一段文本"))
    check_whole(name, value)
    return value


def check_whole(name: str, *texts: str) -> None:
    """
    Raises:
        DataError: A text holds half of a character: Python's strings may, and no tokenizer reads it.
    """
    for text in texts:
        if half := half_a_character(text):
            raise DataError(Bilingual(f"{name} {half}.", f"{name} {local(half, 'zh')}。"))


def as_inputs(inputs: object) -> Iterator[str | tuple[str, ...] | Example]:
    """What is to be predicted, one by one. A text alone is one text, and a list of words is a tuple of them.

    Raises:
        ConfigError: One is no text, pair of texts, or words.
        DataError: One is blank, or holds half of a character.
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
        words = tuple(part for part in ((one,) if isinstance(one, str) else parts) if isinstance(part, str))
        name = f"inputs[{number}]"
        if isinstance(one, Example):
            yield one
            continue
        if not isinstance(one, str) and not (words and len(words) == len(parts)):
            what = Bilingual(
                "a text, a pair of texts, or a list of words (rows with columns: predict_file)",
                "一段文本、一对文本，或词的列表（带列名的数据行：predict_file）",
            )
            raise wrong_kind(one, name, what)
        if not any(map(str.strip, words)):
            raise DataError(
                Bilingual(
                    f"{name} = {short_repr(one)} is blank: there is nothing to predict. Leave it out, or use "
                    "predict_file, which leaves such rows empty.",
                    f"{name} = {short_repr(one)} 是空白文本，没有可预测的内容：请去掉，或用 predict_file，"
                    "它会把这样的行留空。",
                )
            )
        check_whole(name, *words)
        yield one if isinstance(one, str) else words
