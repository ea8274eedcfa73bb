"""What can be done with a finished run: commands that are possible, each with what it is for."""

from __future__ import annotations

from pathlib import Path

from siliang.methods import find_method
from siliang.types import TaskType

# A task, and what its run is asked with; the text stands for the user's own.
ASKED: dict[TaskType, tuple[str, str]] = {
    TaskType.SEQ_CLS: ("predict", "a text"),
    TaskType.CAUSAL_LM: ("generate", "an instruction"),
    TaskType.SEQ_2_SEQ_LM: ("generate", "a text"),
}


def next_steps(folder: Path, task: TaskType, method: str) -> dict[str, tuple[str | Path, ...]]:
    """The words behind `siliang`, by what they do, names of files as paths: use, chat, measure, merge."""
    run = Path(folder)
    steps: dict[str, tuple[str | Path, ...]] = {}
    if task in ASKED:
        command, text = ASKED[task]
        steps["use"] = (command, run, text)
        steps["chat"] = ("chat", run)
    steps["measure"] = ("eval", run)
    if find_method(method).merges:
        merged = Path(f"{run}-merged" if run.name else "merged")
        steps["merge"] = ("merge", run, "--output", merged)
    return steps
