"""The commands that a finished run can be used with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from siliang.methods import find_method
from siliang.tasks import TASKS
from siliang.types import TaskType


def next_steps(
    folder: Path, task: TaskType, method: Mapping[str, object], *, of_texts: bool = False
) -> dict[str, tuple[str | Path, ...]]:
    """The arguments of `siliang` by purpose: use, chat, measure, merge. File names are `Path`s.

    Args:
        method: Its name and settings.
        of_texts: It was trained on plain texts, and continues what it is given.
    """
    run, prompt = Path(folder), "the beginning of a text" if of_texts else TASKS[task].example_prompt
    steps: dict[str, tuple[str | Path, ...]] = {}
    if prompt is not None:  # a placeholder for the user's text
        steps["use"] = ("generate" if TASKS[task].writes else "predict", run, prompt)
        steps["chat"] = ("chat", run)
    steps["measure"] = ("eval", run)
    if find_method(str(method["name"])).why_not_merged(method) is None:
        merged = Path(f"{run}-merged" if run.name else "merged")
        steps["merge"] = ("merge", run, "--output", merged)
    return steps
