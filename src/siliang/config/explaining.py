"""What is wrong with settings, in a line or two for the user: of pydantic's findings, the first that helps."""

from __future__ import annotations

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from siliang.config.describing import NO_MEANING, describe
from siliang.config.names import name_here, quoted
from siliang.config.section import Settings
from siliang.language import Bilingual, local
from siliang.secrets import short_repr
from siliang.types import ConfigError, near, nearest

MOST_MENDED = 20  # more of the wrong names that one message mends


def explain(error: ValidationError, schema: type[Settings]) -> str:
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
        also = " ".join(f"{name}:{hint}" for name, hint in [h for h in hints if h[1]][:MOST_MENDED])
        also = f"\nAlso {also}".replace(": Here that is", ":") if also else ""
        hint = _unknown(first["loc"], first["input"], schema)
        return Bilingual(
            f"{path} is not a setting.{hint} `siliang config` lists them all.{more}{also}",
            f"没有 {path} 这个配置项。{local(hint, 'zh').strip()}`siliang config` 列出全部配置项。{more_zh}{also}",
        )
    if first["type"] == "missing":
        meaning = next((s.meaning for s in describe(schema) if s.name == path), NO_MEANING)
        return Bilingual(f"{path} is missing.{more} {meaning}".rstrip(), f"缺少 {path}。{more_zh}{meaning.zh}")
    return f"{explain_value(first, path)}{more}"


def explain_value(found: ErrorDetails, path: str) -> str:
    """What is wrong with the value of a setting, in one line."""
    inner = found.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):
        text = str(inner)
        return text if path.split(".")[0] in text else f"{path}: {text}"
    shown = short_repr(found["input"], 200)
    hint = _section_for(path, found["input"]) if found["type"] in ("model_type", "dict_type") else ""
    if found["type"] == "list_type":
        hint = f" Write a list: {path}=[a, b]."
    return f"{path} = {shown}: {found['msg'][0].lower()}{found['msg'][1:]}.{hint}"


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
        return f" Here that is {quoted([f'data.train={value}'])}."
    return f" {path} is a section: set its fields, as in {path}.field=value."


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
    return f" Did you mean {' or '.join(map(repr, found[:3]))}?" if found else ""
