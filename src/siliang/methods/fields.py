"""The fields of a method's config, checked by their types wherever they come from: Python, run.yaml, or an adapter's
file.
"""

from __future__ import annotations

import builtins
import dataclasses
import enum
import functools
import typing
from contextlib import suppress
from pathlib import PurePath
from typing import TYPE_CHECKING, TypeGuard, cast, get_args, get_origin, get_type_hints

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from siliang.language import Bilingual, local
from siliang.secrets import short_repr
from siliang.types import ConfigError, KindError, message_of, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SEVERAL: dict[object, Bilingual] = {  # in a message
    int: Bilingual("whole numbers", "整数"),
    float: Bilingual("numbers", "数"),
    str: Bilingual("names", "名称"),
    list[int]: Bilingual("lists of whole numbers", "整数列表"),
}
MOST_ENTRIES = 50_000  # of a list or mapping: the largest models have so many layers, experts counted


def check_fields(config: DataclassInstance) -> None:
    """Checks each field of a dataclass, strictly: "16" is not a number, nor is true. Sets and tuples become lists, and
    the words of an enum become its members.

    Raises:
        ConfigError: A value is not what its field's type allows.
    """
    for name, (kind, check) in _fields(type(config)).items():
        value = _as_field(kind, getattr(config, name), name)
        setattr(config, name, value)
        if isinstance(value, list | dict) and len(value) > MOST_ENTRIES:
            raise ConfigError(
                Bilingual(
                    f"{name} has {len(value):,} entries: at most {MOST_ENTRIES:,} are read.",
                    f"{name} 有 {len(value):,} 项：最多读取 {MOST_ENTRIES:,} 项。",
                )
            )
        try:
            check.validate_python(value)
        except ValidationError:
            hint = _near(value, kind) or _quoted(value)
            raise KindError(
                Bilingual(
                    f"{name} = {short_repr(value)}: must be {_in_words(kind)}.{hint}",
                    f"{name} = {short_repr(value)}：应为{_in_words(kind).zh}。{local(hint, 'zh')}",
                )
            ) from None


def takes_list(kind: type[DataclassInstance], name: str, of: type) -> bool:
    """Whether a field may be a list whose entries are of the type `of`."""
    found, _ = _fields(kind)[name]
    return any(get_origin(k) is list and get_args(k) == (of,) for k in (found, *get_args(found)))


@functools.cache
def _fields(kind: type[DataclassInstance]) -> dict[str, tuple[object, TypeAdapter[object]]]:
    """The type of each field of a dataclass, without `| None`, and what checks it."""
    hints = get_type_hints(kind)
    settings = ConfigDict(strict=True, allow_inf_nan=False)
    return {
        # a group of settings has checked its own
        f.name: (_without_none(hint), TypeAdapter(hint, config=None if _is_group(hint) else settings))
        for f in dataclasses.fields(kind)
        for hint in [hints[f.name]]
    }


def _without_none(kind: object) -> object:
    """`X` of `X | None`."""
    left = [k for k in get_args(kind) if k is not type(None)]
    return left[0] if len(left) == 1 and type(None) in get_args(kind) else kind


def _as_field(kind: object, value: object, name: str) -> object:
    """A value in the form that its field has: a set or tuple as a list, an enum by its word in any case, a Path as its
    name, a number of numpy as one of Python, the mapping of a group of settings as that group.
    """
    if _is_group(kind) and isinstance(value, dict):
        return _group(kind, value, name)
    if isinstance(value, set | frozenset):
        try:
            return sorted(value)
        except TypeError:  # of different types: the check reports which are allowed
            return list(value)
    if isinstance(value, tuple | range):
        return list(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(kind, enum.EnumType) and isinstance(value, str):
        return next((member for member in _members(kind) if member.value.lower() == value.lower()), value)
    return value


def _is_group(kind: object) -> TypeGuard[type[DataclassInstance]]:
    """Whether a field's type is a dataclass: settings within the settings, such as `kasa_config`."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _group(kind: type[DataclassInstance], values: dict[str, object], name: str) -> object:
    """A group of settings, from run.yaml or a file.

    Raises:
        ConfigError: It has no such setting, or a value is not allowed.
    """
    known = [f.name for f in dataclasses.fields(kind)]
    if unknown := next((key for key in values if key not in known), None):
        raise ConfigError(
            Bilingual(
                f"{name} has no setting {short_repr(unknown)}.{nearest(unknown, known)} It has {', '.join(known)}.",
                f"{name} 没有设置项 {short_repr(unknown)}。{nearest(unknown, known).zh}可用：{'、'.join(known)}。",
            )
        )
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(Bilingual(f"{name}: {error}", f"{name}：{local(message_of(error), 'zh')}")) from None


def _members(kind: enum.EnumType) -> list[enum.Enum]:
    return cast(list[enum.Enum], list(kind))


def _in_words(kind: object) -> Bilingual:
    """What a type allows, in the words of a message."""
    words = {
        int: Bilingual("a whole number", "整数"),
        float: Bilingual("a number", "数"),
        bool: Bilingual("true or false", " true 或 false"),
        str: Bilingual("text", "文本"),
        type(None): Bilingual("null", "空值 null"),
    }
    if kind in words:
        return words[kind]
    if _is_group(kind):
        names = [f.name for f in dataclasses.fields(kind)]
        return Bilingual(f"a mapping with {', '.join(names)}", f"含 {'、'.join(names)} 的映射")
    if isinstance(kind, enum.EnumType):
        values = [str(member.value) for member in _members(kind)]
        return Bilingual(f"one of {', '.join(values)}", f" {'、'.join(values)} 之一")
    inner = get_args(kind)
    match get_origin(kind):
        case typing.Literal:
            shown = list(map(repr, inner))
            return Bilingual(
                " or ".join([", ".join(shown[:-1]), shown[-1]][len(inner) < 2 :]),
                " " + " 或 ".join(["、".join(shown[:-1]), shown[-1]][len(inner) < 2 :]),
            )
        case builtins.list:
            several = SEVERAL[inner[0]]
            return Bilingual(f"a list of {several}", f"{several.zh}的列表")
        case builtins.dict:
            if inner[1] not in SEVERAL:
                return Bilingual("a mapping", "映射")
            several = SEVERAL[inner[1]]
            return Bilingual(f"a mapping of names to {several}", f"从名称到{several.zh}的映射")
    if inner:
        each = [_in_words(k) for k in inner]
        return Bilingual(" or ".join(each), "或".join(one.zh for one in each))
    return Bilingual(str(kind), " " + str(kind))


def _near(value: object, kind: object) -> str:
    """Which words of an enum or a literal are similar."""
    words = [str(m.value) for m in _members(kind)] if isinstance(kind, enum.EnumType) else get_args(kind)
    return nearest(value, words) if isinstance(value, str) and all(isinstance(w, str) for w in words) else ""


def _quoted(value: object) -> str:
    """A hint where a text, or one in a mapping or list, is a number."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    for text in inner:
        if isinstance(text, str):
            with suppress(ValueError):
                float(text)
                return Bilingual(f" Write {text} without quotes.", f"{text} 不要加引号。")
    return ""
