"""What can be done with a finished run: commands that are possible, each with what it is for."""

from __future__ import annotations

from pathlib import Path

from siliang.methods import find_method
from siliang.tasks import TASKS
from siliang.types import TaskType


def next_steps(folder: Path, task: TaskType, method: str) -> dict[str, tuple[str | Path, ...]]:
    """The words behind `siliang`, by what they do, names of files as paths: use, chat, measure, merge."""
    run, asked = Path(folder), TASKS[task].example_prompt
    steps: dict[str, tuple[str | Path, ...]] = {}
    if asked is not None:  # in words that stand for the user's own text
        steps["use"] = ("generate" if TASKS[task].writes else "predict", run, asked)
        steps["chat"] = ("chat", run)
    steps["measure"] = ("eval", run)
    if find_method(method).mergeable:
        merged = Path(f"{run}-merged" if run.name else "merged")
        steps["merge"] = ("merge", run, "--output", merged)
    return steps
