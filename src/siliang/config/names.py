"""Settings by their dotted names: assigning one, as --set does, and hints for unknown names and values."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Annotated, cast, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from siliang import other_names
from siliang.config.describing import describe
from siliang.config.section import Settings, Verbatim
from siliang.language import Bilingual, local, together
from siliang.safety.safe_yaml import YamlError, parse_yaml
from siliang.terminal import shell_command
from siliang.types import ConfigError

# Fields of a PEFT config that a run sets by itself.
OWN_FIELDS = {"task_type", "base_model_name_or_path", "inference_mode", "auto_mapping"}

NOT_GIVEN: object = object()
SHELL = re.compile(r"[$`\\;|&<>\x00-\x1f\x7f]")


def assign(values: dict[str, object], assignment: str, schema: type[Settings]) -> None:
    """Sets one field by its dotted name, as in `train.learning_rate=1e-3`. The value is parsed as YAML.

    Args:
        values: The settings so far; changed in place.
        schema: The schema of the settings. If the field is a text, a number stays text. Words that are not quoted keep
            their colon and their #, and lose blanks at their ends, unless the field is marked `Verbatim`.

    Raises:
        ConfigError: `assignment` is not an assignment.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        hint = name_hint(key, schema) if key.strip() else ""
        raise ConfigError(
            Bilingual(
                f"--set {assignment!r}: write it as section.field=value, such as train.learning_rate=1e-3.{hint}",
                f"--set {assignment!r}：应写成 section.field=value，如 train.learning_rate=1e-3。{local(hint, 'zh')}",
            )
        )
    *sections, last = key.strip().split(".")
    for section in sections:
        if section == "method" and isinstance(values.get("method"), str):
            values["method"] = {"name": values["method"]}
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                Bilingual(
                    f"--set {assignment!r}: {section} is a single value, not a section.",
                    f"--set {assignment!r}：{section} 是单个值，不是一组配置项。",
                )
            )
        values = inner
    try:
        value = parse_yaml(text)
    except YamlError:
        value = text
    field = _field(key.strip(), schema)
    beginning = text.lstrip()[:1]
    if field and _is_words(field) and beginning not in ("'", '"') and (value is not None or beginning == "#"):
        # with its colon and its #: "Unnamed: 0" is a column, and "query: " a prompt
        value = text if any(isinstance(mark, Verbatim) for mark in field.metadata) else text.strip()
    elif isinstance(value, int | float) and _is_text(field):  # a commit such as 12e45, or a folder named 2024
        value = text.strip()
    values[last] = value


def differences(was: Mapping[str, object], now: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """The settings in which two dumped configs differ: dotted name to (old value, new value)."""
    found: dict[str, tuple[object, object]] = {}
    for key in (*now, *(k for k in was if k not in now)):
        a, b = was.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= {f"{key}.{name}": pair for name, pair in differences(a, b).items()}
        elif a != b:
            found[key] = (a, b)
    return found


def name_hint(
    name: str,
    schema: type[Settings],
    value: object = NOT_GIVEN,
    *,
    section: str = "",
    fields: Iterable[str] | None = None,
) -> str:
    """A sentence with siliang's setting for an unknown name. Empty if the name is neither a setting of another section
    nor a setting of another tool.

    Args:
        schema: The schema of the settings.
        value: The value that was given for the name.
        section: The section in which the name was given; "" for the top level.
        fields: The settings of the chosen method, for a name under `method`.
    """
    row = other_names.find(name) or _own_setting(name, schema)
    if row is None:
        return ""
    note = Bilingual(f" {row.note}", f"{local(row.note, 'zh')}") if row.note else Bilingual("", "")
    if not row.setting:
        return note
    field = row.setting.removeprefix("method.")
    if row.setting == f"{section}.{name}" or (fields is not None and field != row.setting and field not in fields):
        return ""
    if value is not NOT_GIVEN and (lacking := row.lacks.get(other_names.written(value).lower())) is not None:
        shown = other_names.written(value)
        return Bilingual(f" {shown}: {lacking}", f"{shown}：{local(lacking, 'zh')}")
    found = None if value is NOT_GIVEN else other_names.assignments(row, value)
    if found == []:
        return Bilingual(
            f" siliang needs no setting for this: leave it out.{note}", f"siliang 不需要这个设置，请去掉。{note.zh}"
        )
    if found is not None and _is_valid(found, schema):
        return together(use_hint(found), note)
    return Bilingual(
        f" Use {row.setting}, as in `{row.setting}={row.example}`.{note}",
        f"请用 {row.setting}，如 `{row.setting}={row.example}`。{note.zh}",
    )


def value_hint(setting: str, value: object, schema: type[Settings]) -> str:
    """A sentence with siliang's value for another tool's value of a setting. Empty if the value is unknown, or if its
    meaning differs between tools."""
    rows = [row for row in other_names.TABLE if row.setting == setting]
    shown = other_names.written(value)
    text = shown.lower()
    if lacking := next((row.lacks[text] for row in rows if text in row.lacks), ""):
        return Bilingual(f" {shown}: {lacking}", f"{shown}：{local(lacking, 'zh')}")
    found = {row.values[text] for row in rows if text in row.values}
    if not found and text != shown:
        found = {f"{setting}={text}"}  # AdamW: only the case differs. The unchanged value is known to be wrong
    if len(found) != 1:
        return ""
    if (ours := found.pop()) is None:
        return Bilingual(" siliang needs no setting for this: leave it out.", "siliang 不需要这个设置，请去掉。")
    assignments = other_names.split(ours)
    return use_hint(assignments) if _is_valid(assignments, schema) else ""


def use_hint(assignments: Iterable[str]) -> Bilingual:
    """The hint to use these assignments, as a sentence."""
    shown = quoted(assignments)
    return Bilingual(f" Use {shown}.", f"请用 {shown.zh}。")


def quoted(assignments: Iterable[str]) -> Bilingual:
    """Assignments that can be pasted into a shell: quoted if they have special characters."""
    shown = [f"`{shell_command(a) if SHELL.search(a) else a}`" for a in assignments]
    return Bilingual(" and ".join(shown), " 和 ".join(shown))


def _field(name: str, schema: type[BaseModel]) -> FieldInfo | None:
    """The field of a setting; None where there is no such setting."""
    kind, field = cast(object, schema), None
    for part in name.split("."):
        sections = [k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel)]
        field = sections[0].model_fields.get(part) if sections else None
        kind = None if field is None else field.annotation
    return field


def _is_text(field: FieldInfo | None) -> bool:
    """Whether the setting is a text, and cannot be a number."""
    if field is None:
        return False
    kinds = {_bare(k) for k in get_args(field.annotation)} or {field.annotation}
    return str in kinds and kinds <= {str, list, NoneType}


def _is_words(field: FieldInfo) -> bool:
    """Whether the setting is a text that its field does not read in a way of its own: a column, a commit, a prompt."""
    if any(not isinstance(mark, Verbatim) for mark in field.metadata):
        return False
    kinds = set(get_args(field.annotation)) or {field.annotation}
    return str in kinds and kinds <= {str, NoneType}


def _bare(kind: object) -> object:
    """`str` of Annotated[str, ...], `list` of list[str]."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else get_origin(kind) or kind


def _own_setting(name: str, schema: type[Settings]) -> other_names.Row | None:
    """A setting of this name in another section, or a field of this name in a method's config."""
    from siliang.methods import METHODS

    name = other_names.plain(name)
    found = [setting.name for setting in describe(schema) if setting.name.rpartition(".")[2] == name]
    configs = [m.config for m in METHODS.values() if m.config is not None]
    if not found and any(f.name == name for c in configs for f in dataclasses.fields(c) if f.name not in OWN_FIELDS):
        found = [f"method.{name}"]
    return other_names.Row(found[0], (name,), "...") if len(found) == 1 else None


def _is_valid(assignments: Iterable[str], schema: type[Settings]) -> bool:
    """Whether a run with these settings is valid."""
    for method in ("lora", "prompt_tuning"):
        values: dict[str, object] = {"model": "m", "task": "causal_lm", "data": {"train": "d"}, "output": "o"}
        values |= {"method": {"name": method}, "train": {"eval_every": 1}}  # for train.best and train.patience
        try:
            for assignment in assignments:
                assign(values, assignment, schema)
            schema.build(values)
            return True
        except ConfigError:
            continue
    return False
