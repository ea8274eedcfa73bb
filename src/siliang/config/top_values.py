"""The values of task, method and adapter, and what to write in place of other tools' values."""

from __future__ import annotations

from pathlib import Path

from siliang import other_names
from siliang.config.names import quoted
from siliang.language import Bilingual, local
from siliang.types import TRAINED_TASKS, ConfigError, nearest


def as_method(value: object) -> object:
    """A method's name as its section; a name of other tools is refused with ours."""
    name = value.get("name") if isinstance(value, dict) else value
    if isinstance(name, str) and (here := other_names.METHOD_VALUES.get(other_names.plain(name))):
        raise ConfigError(_use_instead(f"method = {name!r}", here.split()))
    return {"name": value} if isinstance(value, str) else value


def as_adapter(value: object) -> object:
    """The adapter; a method's name is refused with the setting that it belongs to."""
    if isinstance(value, str) and other_names.is_method(value) and not Path(value).exists():
        here = other_names.METHOD_VALUES.get(other_names.plain(value), f"method={other_names.plain(value)}")
        raise ConfigError(
            _use_instead(
                Bilingual(f"adapter = {value!r} is not an adapter", f"adapter = {value!r} 不是适配器"), here.split()
            )
        )
    return value


def _use_instead(what: str, assignments: list[str]) -> Bilingual:
    shown = quoted(assignments)
    return Bilingual(f"{what}: use {shown}.", f"{local(what, 'zh')}：请用 {local(shown, 'zh')}。")


def as_task(value: object) -> object:
    """The task of a name; a name of other tools is refused with ours."""
    if not isinstance(value, str):
        return value
    if (here := other_names.TASK_VALUES.get(other_names.plain(value))) is not None:
        raise ConfigError(Bilingual(f"task = {value!r}: use `task={here}`.", f"task = {value!r}：请用 `task={here}`。"))
    name = value.lower().replace("-", "_")
    for task in TRAINED_TASKS:
        if task.lower() == name:
            return task
    allowed = [task.lower() for task in TRAINED_TASKS]
    tasks, alike = ", ".join(allowed), nearest(name, allowed)
    raise ConfigError(
        Bilingual(
            f"task = {value!r}: must be one of {tasks}.{alike}", f"task = {value!r}：只能是 {tasks} 之一。{alike.zh}"
        )
    )
