"""The kinds of a function's arguments, by its annotations: a value of another kind is an error in words.

Checked are the parameters that take texts, numbers, True or False, names, lists of texts and functions. Others (paths,
data, runs) are checked where they are read.
"""

from __future__ import annotations

import builtins
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from siliang.language import Bilingual
from siliang.secrets import short_repr
from siliang.types import ConfigError


def check_kinds(function: Callable[..., object], arguments: Mapping[str, object]) -> dict[str, object]:
    """The arguments of a function or of a dataclass, with numbers as Python's own, and one text where a list of texts
    belongs as a list.

    Raises:
        ConfigError: One has another kind than its parameter.
    """
    kinds = _kinds(function)
    return {name: _checked(name, value, kinds.get(name, ())) for name, value in arguments.items()}


@cache
def _kinds(function: Callable[..., object]) -> dict[str, tuple[Any, ...]]:
    """The kinds that each parameter takes; none of one that is not checked."""
    found: dict[str, tuple[Any, ...]] = {}
    names = _Names(vars(sys.modules[function.__module__]))
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        hint: Any = eval(str(parameter.annotation), {}, names)  # the module's own annotation
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if all(_known(kind) for kind in kinds):
            found[name] = kinds
    return found


class _Names(dict[str, object]):
    """A module's names; types that it imports for type checkers alone are any object."""

    def __missing__(self, name: str) -> object:
        return getattr(builtins, name, object)


def _known(kind: Any) -> bool:
    origin = get_origin(kind)
    return kind in (bool, int, float, str, NoneType) or origin in (Literal, Callable) or _is_list_of_texts(kind)


def _is_list_of_texts(kind: Any) -> bool:
    of = get_args(kind)
    return get_origin(kind) is Sequence and len(of) == 1 and (of[0] is str or get_origin(of[0]) is Literal)


def _checked(name: str, value: object, kinds: tuple[Any, ...]) -> object:
    if not kinds:
        return value
    for kind in kinds:
        origin = get_origin(kind)
        if origin is Literal and isinstance(value, str) and value in get_args(kind):
            return value
        if origin is Callable and callable(value):
            return value
        if _is_list_of_texts(kind):
            if isinstance(value, str):
                return (value,)
            if isinstance(value, Iterable) and not isinstance(value, bytes | Mapping):
                texts = tuple(value)
                if all(isinstance(text, str) for text in texts):
                    return texts
        if kind in (NoneType, bool, str) and isinstance(value, kind):
            return value
        if not isinstance(value, Real) or isinstance(value, bool):
            continue
        if kind is int and (isinstance(value, Integral) or _as_float(name, value).is_integer()):  # 24e9 bytes, too
            return _as_int(name, value)
        if kind is float and not math.isnan(number := _as_float(name, value)):  # NaN is no number, in any range
            return number
    raise wrong_kind(value, name, _in_words(kinds))


def _as_int(name: str, value: Real) -> int:
    """
    Raises:
        ConfigError: It has more bits than a whole number of the libraries below.
    """
    number = int(value) if isinstance(value, Integral) else int(float(value))
    if not -(2**63) <= number < 2**63:
        raise _too_large(name, f"{2**63 - 1:,}")
    return number


def _as_float(name: str, value: Real) -> float:
    """
    Raises:
        ConfigError: It is larger than any floating-point number.
    """
    try:
        return float(value)
    except OverflowError:  # of int and Fraction
        raise _too_large(name, f"{sys.float_info.max:.2g}") from None


def _too_large(name: str, most: str) -> ConfigError:
    """The error of a number whose digits cannot all be shown."""
    return ConfigError(
        Bilingual(
            f"{name} is too large or too small: must be between -{most} and {most}.",
            f"{name} 过大或过小：应在 -{most} 与 {most} 之间。",
        )
    )


def _in_words(kinds: tuple[Any, ...]) -> Bilingual:
    """The kinds in words, None last."""
    words = [word for kind in sorted(kinds, key=lambda kind: kind is NoneType) for word in _words(kind)]
    zh = [word.zh for word in words]
    return Bilingual(
        " or ".join(filter(None, [", ".join(words[:-1]), words[-1]])),
        "或".join(filter(None, ["、".join(zh[:-1]), zh[-1]])),
    )


def _words(kind: Any) -> list[Bilingual]:
    if get_origin(kind) is Literal:
        names = list(map(repr, get_args(kind)))
        return [Bilingual(name, name) for name in names]
    if get_origin(kind) is Callable:
        return [Bilingual("a function", "函数")]
    if _is_list_of_texts(kind):
        return [Bilingual("a list of texts", "文本的列表")]
    names = {
        bool: Bilingual("True or False", "True 或 False"),
        int: Bilingual("a whole number", "整数"),
        float: Bilingual("a number", "数"),
        str: Bilingual("a text", "一段文本"),
        NoneType: Bilingual("None", "空值（None）"),
    }
    return [names[kind]]


def wrong_kind(value: object, name: str, what: str) -> ConfigError:
    """The error of an argument of another kind."""
    shown, kind = short_repr(value), type(value).__name__
    wanted = what if isinstance(what, Bilingual) else Bilingual(what, what)
    wanted_zh = re.sub(r"(?<=[\u4e00-\u9fff])(?=['A-Za-z.])|(?<=')(?=[\u4e00-\u9fff])", " ", f"应为{wanted.zh}")
    return ConfigError(
        Bilingual(f"{name} = {shown} ({kind}): must be {wanted}.", f"{name} = {shown}（{kind}）：{wanted_zh}。")
    )


def check_least(**numbers: float | None) -> None:
    """
    Raises:
        ConfigError: A number is below 1.
    """
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ConfigError(
                Bilingual(f"{name} = {number:,}: must be 1 or more.", f"{name} = {number:,}：应不小于 1。")
            )
