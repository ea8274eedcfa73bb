"""Whether a finished run has learned anything at all."""

from __future__ import annotations

from collections.abc import Mapping

from siliang.records import Answers, Verdict
from siliang.tasks.task import HeldOutAnswers, Task


def learned_nothing(
    task: Task, final: Mapping[str, float], answers: Answers | None, base: Mapping[str, float]
) -> Verdict | None:
    """Why a finished run has learned nothing, or None where it has, or where that cannot be checked.

    Args:
        task: With the run's settings.
        final: The run's metrics on the held-out rows.
        answers: What it says to some of them.
        base: The base model's metrics on them.
    """
    held_out = None
    if answers is not None:
        predicted, expected = [a.predicted for a in answers.rows], [a.expected or "" for a in answers.rows]
        held_out = HeldOutAnswers(predicted, expected, answers.majority, answers.classes)
    return task.verdict(final, base, held_out)
