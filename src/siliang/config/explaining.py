"""Turns pydantic's errors about settings into one or two lines for the user."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from siliang.config.describing import NO_MEANING, describe
from siliang.config.names import name_hint, use_hint, value_hint
from siliang.config.section import Settings
from siliang.language import Bilingual, local, together
from siliang.secrets import short_repr
from siliang.types import ConfigError, did_you_mean, near, nearest

MAX_HINTS = 20  # further unknown names that a message explains
MAX_OTHERS = 4  # further wrong values that a message shows
KINDS = ("constrained", "list[", "literal[", "union[")  # prefixes of the parts of a pydantic `loc` that name a type
# pydantic's error types in Chinese; the English text is pydantic's
WRONG_ZH = {
    "bool_type": "应为 true 或 false",
    "int_type": "应为整数",
    "float_type": "应为数字",
    "string_type": "应为文本",
    "list_type": "应为列表",
    "dict_type": "应为一组配置项",
    "model_type": "应为一组配置项",
    "literal_error": "应为 {expected}",
    "enum": "应为 {expected}",
    "greater_than": "应大于 {gt}",
    "greater_than_equal": "应不小于 {ge}",
    "less_than": "应小于 {lt}",
    "less_than_equal": "应不大于 {le}",
    "finite_number": "应为有限的数",
    "too_short": "至少应有 {min_length} 项",
    "string_too_short": "至少应有 {min_length} 个字符",
    "string_pattern_mismatch": "不符合 {pattern}",
}


def explain(error: ValidationError, schema: type[Settings], *, others_too: bool = True) -> Bilingual:
    """The first error in one line, and the others in a second line, with siliang's names for unknown keys. Unknown keys
    come first, because a missing key may be one of them.

    Args:
        others_too: Add the second line.
    """
    found = sorted(first_of_each(error, schema), key=lambda e: e["type"] != "extra_forbidden")
    first, *others = found
    if not others_too:
        return _explained(first, schema, more=True)
    if first["type"] == "extra_forbidden":
        others = [e for e in others if e["type"] != "missing"]
    unknown = [e for e in others if e["type"] == "extra_forbidden"]
    hints = [(path_of(e), _unknown(e["loc"], e["input"], schema, guess=False)) for e in unknown]
    hinted = {name: hint for name, hint in hints if hint}
    shown = [
        together(name, Bilingual(":", "："), _after_colon(hint)) for name, hint in list(hinted.items())[:MAX_HINTS]
    ]
    rest = [_explained(e, schema, more=False) for e in others if path_of(e) not in hinted]
    return together(_explained(first, schema, more=True), others_line(shown, rest))


def first_of_each(error: ValidationError, schema: type[BaseModel]) -> list[ErrorDetails]:
    """The first error of each setting: pydantic has one error for each allowed type, and for each entry of a list."""
    names = {setting.name for setting in describe(schema)}
    found: dict[str, ErrorDetails] = {}
    for one in error.errors():
        path = path_of(one)
        if one["type"] != "extra_forbidden":
            parts = path.split(".")
            path = next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in names), path)
        found.setdefault(path, one)
    return list(found.values())


def path_of(found: ErrorDetails) -> str:
    """The dotted name of the setting of an error, without the parts that name a type."""
    parts = list(map(str, found["loc"]))
    own = [parts.pop()] if found["type"] == "extra_forbidden" else []  # as the user wrote it
    return ".".join([*(part for part in parts if part not in ("str", "int") and not part.startswith(KINDS)), *own])


def others_line(hints: Sequence[Bilingual], wrong: Sequence[Bilingual]) -> Bilingual:
    """A separate line with the other errors: all `hints`, and the first few of `wrong`. Empty if there are none."""
    shown = [*hints, *wrong[:MAX_OTHERS]]
    if not shown:
        return Bilingual("", "")
    left = len(wrong) - MAX_OTHERS
    more = Bilingual(f" And {left} more.", f"还有 {left} 处。") if left > 0 else Bilingual("", "")
    return Bilingual(
        f"\nAlso {' '.join(one.partition(chr(10))[0] for one in shown)}{more}",
        f"\n另外，{''.join(one.zh.partition(chr(10))[0] for one in shown)}{more.zh}",
    )


def _explained(found: ErrorDetails, schema: type[Settings], *, more: bool) -> Bilingual:
    """The text of one error.

    Args:
        more: Add what helps to correct it: similar names, the meaning of the setting.
    """
    path = path_of(found)
    if found["type"] == "extra_forbidden":
        if not more:
            return Bilingual(f"{path} is not a setting.", f"没有 {path} 这个配置项。")
        hint = _unknown(found["loc"], found["input"], schema)
        return Bilingual(
            f"{path} is not a setting.{hint} `siliang config` lists them all.",
            f"没有 {path} 这个配置项。{local(hint, 'zh').strip()}`siliang config` 列出全部配置项。",
        )
    if found["type"] == "missing":
        meaning = next((s.meaning for s in describe(schema) if s.name == path and more), NO_MEANING)
        return Bilingual(f"{path} is missing. {meaning}".rstrip(), f"缺少 {path}。{meaning.zh}")
    return explain_value(found, path, schema)


def explain_value(found: ErrorDetails, path: str, schema: type[Settings] | None = None) -> Bilingual:
    """The error of a setting's value, in one line. With a `schema`, it includes siliang's value for another tool's."""
    inner = found.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):
        has_name = path.split(".")[0] in str(inner)
        return together(inner.text) if has_name else together(path, Bilingual(": ", "："), inner.text)
    shown = short_repr(found["input"], 200)
    hint = _section_for(path, found["input"]) if found["type"] in ("model_type", "dict_type") else ""
    if found["type"] == "list_type":
        hint = Bilingual(f" Write a list: {path}=[a, b].", f"写成列表：{path}=[a, b]。")
    if found["type"] == "literal_error" and schema is not None:
        hint = value_hint(path.rstrip(".0123456789"), found["input"], schema)  # train.trackers.0
    wrong = wrong_value(found)
    return Bilingual(
        f"{path} = {shown}: {wrong}.{hint}", f"{path} = {shown}：{local(wrong, 'zh')}。{local(hint, 'zh')}"
    )


def wrong_value(found: ErrorDetails) -> str:
    """pydantic's message, and its Chinese translation."""
    en = f"{found['msg'][0].lower()}{found['msg'][1:]}"
    zh = WRONG_ZH.get(found["type"])
    return en if zh is None else Bilingual(en, zh.format(**found.get("ctx", {})).replace(" or ", " 或 "))


def undecodable(value: object, where: str = "") -> str | None:
    """The first setting with bytes that are not text, from the command line; None if there is none."""
    if isinstance(value, dict):
        parts = [(f"{where}.{key}".lstrip("."), inner) for key, inner in value.items()]
        return next((found for name, inner in parts if (found := undecodable(inner, name)) is not None), None)
    if isinstance(value, list):
        return next((found for inner in value if (found := undecodable(inner, where)) is not None), None)
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        return f"{where} = {value!r}"
    return None


def _after_colon(hint: str) -> Bilingual:
    """A hint that continues a sentence: " Use ..." becomes " use ..."."""
    en = f" use {hint[5:]}" if hint.startswith(" Use ") else str(hint)
    return Bilingual(en, local(hint, "zh"))


def _section_for(path: str, value: object) -> str:
    """A hint for a section that is set to a single value."""
    if path in ("data", "train") and isinstance(value, str) and value:
        return use_hint([f"data.train={value}"])
    return Bilingual(
        f" {path} is a section: set its fields, as in {path}.field=value.",
        f"{path} 是一组配置项：请设置其中的项，如 {path}.field=value。",
    )


def _unknown(place: tuple[int | str, ...], value: object, schema: type[Settings], *, guess: bool = True) -> str:
    """siliang's name for an unknown key, or similar names."""
    *sections, own = map(str, place)
    if hint := name_hint(own, schema, value, section=".".join(sections)):
        return hint
    if not guess:
        return ""
    names, depth = [setting.name for setting in describe(schema)], len(sections)
    siblings = {p[depth] for n in names if len(p := n.split(".")) > depth and p[:depth] == sections}
    if hint := nearest(own, siblings):
        return hint
    similar = near(own, {name.rpartition(".")[2] for name in names})  # in another section
    found = [name for leaf in similar for name in names if name.rpartition(".")[2] == leaf]
    return did_you_mean(found[:3])
