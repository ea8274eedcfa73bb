"""How good a run is, in one figure by its task, and whether it learned anything at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from siliang.records import Answers, Verdict, better, higher_is_better
from siliang.types import TaskType

SLACK = 1e-9  # of figures that are equal but for rounding


@dataclass(frozen=True)
class Quality:
    """The figure that a task is judged by.

    Attributes:
        name: Its key in the record's final metrics.
    """

    name: str

    @property
    def higher(self) -> bool:
        """More of it is better."""
        return higher_is_better(self.name)

    def better(self, a: float, b: float) -> bool:
        """Whether `a` is better than `b`; a number is better than none (NaN)."""
        return better(self.name, a, b)


QUALITY = {
    TaskType.SEQ_CLS: Quality("accuracy"),
    TaskType.TOKEN_CLS: Quality("f1"),
    TaskType.QUESTION_ANS: Quality("f1"),
    TaskType.CAUSAL_LM: Quality("eval_loss"),
    TaskType.SEQ_2_SEQ_LM: Quality("eval_loss"),
}


def learned_nothing(
    task: TaskType, final: Mapping[str, float], answers: Answers | None, base: Mapping[str, float]
) -> Verdict | None:
    """Why a finished run has learned nothing, or None where it has, or where that cannot be checked.

    Args:
        final: The run's metrics on the held-out rows.
        answers: What it says to some of them.
        base: The base model's metrics on them.
    """
    match task:
        case TaskType.SEQ_CLS if answers is not None:
            if (answers.classes or 0) > 1 and _one_class(answers):
                return "one class"
            if answers.majority is not None and final.get("accuracy", 1.0) <= answers.majority + SLACK:
                return "majority"
        case TaskType.TOKEN_CLS | TaskType.QUESTION_ANS if final.get("f1") == 0:
            return "no spans"
        case TaskType.CAUSAL_LM | TaskType.SEQ_2_SEQ_LM if "eval_loss" in base and "eval_loss" in final:
            if final["eval_loss"] >= base["eval_loss"] - SLACK:
                return "not below the base"
    return None


def _one_class(answers: Answers) -> bool:
    """One class is said to all rows, though they are of several."""
    return len({a.right for a in answers.rows}) > 1 and len({a.given for a in answers.rows}) == 1
