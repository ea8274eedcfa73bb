"""Lists the settings: the dotted name, type, default and meaning of each."""

from __future__ import annotations

import ast
import inspect
from itertools import pairwise
from textwrap import dedent
from typing import Annotated, Literal, NamedTuple, NewType, get_args, get_origin

from pydantic import BaseModel

from siliang import other_names
from siliang.config.section import Section
from siliang.language import Bilingual, joined
from siliang.types import TRAINED_TASKS, TaskType

NO_MEANING = Bilingual("", "")


class Setting(NamedTuple):
    """One setting, as `siliang config` lists it."""

    name: str
    """The dotted name, such as train.learning_rate."""
    kind: str
    default: str
    meaning: Bilingual


def describe(section: type[BaseModel], prefix: str = "") -> list[Setting]:
    """All settings of a section and its subsections, in order."""
    found: list[Setting] = []
    meanings = _meanings(section)
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found += describe(kind, f"{prefix}{name}.")
            continue
        inner = next((k for k in get_args(kind) if isinstance(k, type) and issubclass(k, Section)), None)
        if inner is not None:
            found.append(Setting(prefix + name, "mapping | null", "null", meanings.get(name, NO_MEANING)))
            found += describe(inner, f"{prefix}{name}.")
            continue
        default = "(required)"
        if not info.is_required():
            default = other_names.written(info.get_default(call_default_factory=True, validated_data={}))
        found.append(Setting(prefix + name, _kind_name(kind), default, meanings.get(name, NO_MEANING)))
    return found


def _meanings(section: type[BaseModel]) -> dict[str, Bilingual]:
    """The docstring below each field: a paragraph in English and one in Chinese.

    They are read only here: pydantic's `use_attribute_docstrings` would read those of every class at import.
    """
    (node,) = ast.parse(dedent(inspect.getsource(section))).body
    assert isinstance(node, ast.ClassDef)
    return {
        field.target.id: _two_languages(text.value.value)
        for field, text in pairwise(node.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _two_languages(docstring: str) -> Bilingual:
    en, _, zh = inspect.cleandoc(docstring).partition("\n\n")
    return Bilingual(joined(en), joined(zh))


def _kind_name(kind: object) -> str:
    if isinstance(kind, type):
        if issubclass(kind, TaskType):
            return " | ".join(task.lower() for task in TRAINED_TASKS)
        return {"MethodConfig": "name or mapping"}.get(kind.__name__, kind.__name__)
    if isinstance(kind, NewType):
        return kind.__name__.lower()
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return " | ".join(str(getattr(a, "value", a)).lower() for a in arguments)
    if get_origin(kind) is Annotated:
        return _kind_name(arguments[0])
    if get_origin(kind) is list:
        return f"list of {_kind_name(arguments[0])}"
    return " | ".join("null" if a is type(None) else _kind_name(a) for a in arguments)
