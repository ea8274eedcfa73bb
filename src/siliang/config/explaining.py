"""What is wrong with settings, in a line or two for the user, from pydantic's findings."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from siliang.config.describing import NO_MEANING, describe
from siliang.config.names import here_it_is, name_here, value_here
from siliang.config.section import Settings
from siliang.language import Bilingual, local, together
from siliang.secrets import short_repr
from siliang.types import ConfigError, did_you_mean, near, nearest

MOST_HINTS = 20  # more of the wrong names that one message explains
MOST_ALSO = 4  # more of the wrong values that it names
KINDS = ("constrained", "list[", "literal[", "union[")  # parts of a place by which pydantic names a kind of value
# pydantic's kinds of errors in Chinese; their English is pydantic's own
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
    """The first finding in one line, and the others in a second one, with what unknown keys are here. Unknown keys come
    first, for they may be what is missing.

    Args:
        others_too: Also the second line.
    """
    found = sorted(one_each(error, schema), key=lambda e: e["type"] != "extra_forbidden")
    first, *others = found
    if not others_too:
        return _explained(first, schema, more=True)
    if first["type"] == "extra_forbidden":
        others = [e for e in others if e["type"] != "missing"]
    unknown = [e for e in others if e["type"] == "extra_forbidden"]
    hints = [(path_of(e), _unknown(e["loc"], e["input"], schema, guess=False)) for e in unknown]
    here = {name: hint for name, hint in hints if hint}
    shown = [
        Bilingual(
            f"{name}:{hint.removeprefix(' Here that is')}", f"{name}：{local(hint, 'zh').removeprefix('这里写作 ')}"
        )
        for name, hint in list(here.items())[:MOST_HINTS]
    ]
    rest = [_explained(e, schema, more=False) for e in others if path_of(e) not in here]
    return together(_explained(first, schema, more=True), also(shown, rest))


def one_each(error: ValidationError, schema: type[BaseModel]) -> list[ErrorDetails]:
    """The findings, the first for each setting: pydantic has one for each kind that a value may be of, and for each
    entry of a list."""
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
    """The dotted name of what a finding is about, without the parts by which pydantic names the kinds that a value may
    be of."""
    parts = list(map(str, found["loc"]))
    own = [parts.pop()] if found["type"] == "extra_forbidden" else []  # as the user wrote it
    return ".".join([*(part for part in parts if part not in ("str", "int") and not part.startswith(KINDS)), *own])


def also(hints: Sequence[Bilingual], wrong: Sequence[Bilingual]) -> Bilingual:
    """What else is wrong, as a line of its own: all `hints`, and the first few of `wrong`; empty for nothing."""
    shown = [*hints, *wrong[:MOST_ALSO]]
    if not shown:
        return Bilingual("", "")
    left = len(wrong) - MOST_ALSO
    more = Bilingual(f" And {left} more.", f"还有 {left} 处。") if left > 0 else Bilingual("", "")
    return Bilingual(
        f"\nAlso {' '.join(one.partition(chr(10))[0] for one in shown)}{more}",
        f"\n另外，{''.join(one.zh.partition(chr(10))[0] for one in shown)}{more.zh}",
    )


def _explained(found: ErrorDetails, schema: type[Settings], *, more: bool) -> Bilingual:
    """One finding.

    Args:
        more: With what helps to correct it: the names that there are, the setting's meaning.
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
    """What is wrong with the value of a setting, in one line; of a setting of `schema`, what another tool's value is
    here."""
    inner = found.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):
        named = path.split(".")[0] in str(inner)
        return together(inner.text) if named else together(path, Bilingual(": ", "："), inner.text)
    shown = short_repr(found["input"], 200)
    hint = _section_for(path, found["input"]) if found["type"] in ("model_type", "dict_type") else ""
    if found["type"] == "list_type":
        hint = Bilingual(f" Write a list: {path}=[a, b].", f"写成列表：{path}=[a, b]。")
    if found["type"] == "literal_error" and schema is not None:
        hint = value_here(path.rstrip(".0123456789"), found["input"], schema)  # train.trackers.0
    wrong = wrong_value(found)
    return Bilingual(
        f"{path} = {shown}: {wrong}.{hint}", f"{path} = {shown}：{local(wrong, 'zh')}。{local(hint, 'zh')}"
    )


def wrong_value(found: ErrorDetails) -> str:
    """pydantic's own words, and the same in Chinese."""
    en = f"{found['msg'][0].lower()}{found['msg'][1:]}"
    zh = WRONG_ZH.get(found["type"])
    return en if zh is None else Bilingual(en, zh.format(**found.get("ctx", {})).replace(" or ", " 或 "))


def undecodable(value: object, where: str = "") -> str | None:
    """The first setting that holds bytes which are not text, as the command line's may; None where none does."""
    if isinstance(value, dict):
        parts = [(f"{where}.{key}".lstrip("."), inner) for key, inner in value.items()]
        return next((found for name, inner in parts if (found := undecodable(inner, name)) is not None), None)
    if isinstance(value, list):
        return next((found for inner in value if (found := undecodable(inner, where)) is not None), None)
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        return f"{where} = {value!r}"
    return None


def _section_for(path: str, value: object) -> str:
    """What was meant where a section got a value of its own."""
    if path in ("data", "train") and isinstance(value, str) and value:
        return here_it_is([f"data.train={value}"])
    return Bilingual(
        f" {path} is a section: set its fields, as in {path}.field=value.",
        f"{path} 是一组配置项：请设置其中的项，如 {path}.field=value。",
    )


def _unknown(place: tuple[int | str, ...], value: object, schema: type[Settings], *, guess: bool = True) -> str:
    """What an unknown key is here, or the names near it."""
    *sections, own = map(str, place)
    if hint := name_here(own, schema, value, section=".".join(sections)):
        return hint
    if not guess:
        return ""
    names, depth = [setting.name for setting in describe(schema)], len(sections)
    siblings = {p[depth] for n in names if len(p := n.split(".")) > depth and p[:depth] == sections}
    if hint := nearest(own, siblings):
        return hint
    alike = near(own, {name.rpartition(".")[2] for name in names})  # in another section
    found = [name for leaf in alike for name in names if name.rpartition(".")[2] == leaf]
    return did_you_mean(found[:3])
