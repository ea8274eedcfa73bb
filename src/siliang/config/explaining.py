"""What is wrong with settings, in a line or two for the user: of pydantic's findings, the first that helps."""

from __future__ import annotations

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from siliang.config.describing import NO_MEANING, describe
from siliang.config.names import here_it_is, name_here, value_here
from siliang.config.section import Settings
from siliang.language import Bilingual, local, together
from siliang.secrets import short_repr
from siliang.types import ConfigError, did_you_mean, near, nearest

MOST_ALSO = 20  # more of the wrong names that one message explains
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


def explain(error: ValidationError, schema: type[Settings]) -> Bilingual:
    """The first finding in one line, with what an unknown key is here; unknown keys first, for they may be what is
    missing."""
    found = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = found[0]
    path = ".".join(str(part) for part in first["loc"])
    n = error.error_count() - 1
    more, more_zh = (f" ({n} more)", f"（另有 {n} 处）") if n else ("", "")
    if first["type"] == "extra_forbidden":
        others = [e for e in found[1:] if e["type"] == "extra_forbidden"]
        hints = [(".".join(map(str, e["loc"])), _unknown(e["loc"], e["input"], schema, guess=False)) for e in others]
        shown = [(name, hint) for name, hint in hints if hint][:MOST_ALSO]
        also = " ".join(f"{name}:{hint.removeprefix(' Here that is')}" for name, hint in shown)
        also_zh = "".join(f"{name}：{local(hint, 'zh').removeprefix('这里写作 ')}" for name, hint in shown)
        also, also_zh = (f"\nAlso {also}", f"\n另外，{also_zh}") if also else ("", "")
        hint = _unknown(first["loc"], first["input"], schema)
        return Bilingual(
            f"{path} is not a setting.{hint} `siliang config` lists them all.{more}{also}",
            f"没有 {path} 这个配置项。{local(hint, 'zh').strip()}`siliang config` 列出全部配置项。{more_zh}{also_zh}",
        )
    if first["type"] == "missing":
        meaning = next((s.meaning for s in describe(schema) if s.name == path), NO_MEANING)
        return Bilingual(f"{path} is missing.{more} {meaning}".rstrip(), f"缺少 {path}。{more_zh}{meaning.zh}")
    return together(explain_value(first, path, schema), Bilingual(more, more_zh))


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
    wrong = _wrong(found)
    return Bilingual(
        f"{path} = {shown}: {wrong}.{hint}", f"{path} = {shown}：{local(wrong, 'zh')}。{local(hint, 'zh')}"
    )


def _wrong(found: ErrorDetails) -> str:
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
