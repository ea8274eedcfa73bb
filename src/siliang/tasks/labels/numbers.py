"""A number for a text (a regression): metrics and predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from siliang.config import ClassificationConfig
from siliang.data.examples import Labelled
from siliang.data.prepared import EvalRows
from siliang.records import Verdict
from siliang.records.classes import Classification, ClassReport
from siliang.tasks.labels import metrics
from siliang.tasks.labels.losses import squared_error
from siliang.tasks.labels.predictions import asked, input_values, inputs_of, mistakes, read_logits, replies_of, stacked
from siliang.tasks.metrics import MAE, SPEARMAN
from siliang.tasks.task import HeldOutAnswers, LabelHooks, Metric, Reply, Task, Trained

R2, MSE = Metric("r2"), Metric("mse", higher=False)


@dataclass(frozen=True)
class PredictedNumber:
    """A text and its number."""

    text: str
    number: float
    pair: str | None = None
    probability: None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The text, or the two of a pair."""
        return inputs_of(self.text, self.pair)

    @property
    def predicted(self) -> str:
        """The number."""
        return f"{self.number:.4g}"

    def values(self) -> dict[str, object]:
        """The same for JSON."""
        return input_values(self.text, self.pair) | {"number": round(self.number, 6)}


def as_number_of_text(task: Task, settings: ClassificationConfig, learned: Classification | None) -> Task:
    """The task with a number a row."""
    return replace(
        task,
        loss=squared_error,
        smooths_labels=False,
        read=read_logits,
        metrics=(SPEARMAN, MSE, MAE, R2),
        measure=measure,
        quality=SPEARMAN,
        majority=None,
        replies=replies,
        verdict=verdict,
        judged_by="metrics",
        predict=predict,
        blank={"text": "", "number": None},
        labels=LabelHooks(report=report),
    )


def measure(found: Mapping[int, np.ndarray], rows: EvalRows) -> dict[str, float]:
    """Squared and absolute error, the correlation of ranks, and R squared."""
    return metrics.of_numbers(*_both(found, rows))


def replies(found: Mapping[int, np.ndarray], rows: EvalRows) -> Iterator[tuple[int, Reply]]:
    """The number of each text, which is neither right nor wrong."""
    if not found:
        return
    pairs = zip(*_both(found, rows), strict=True)
    yield from replies_of(found, rows, ((f"{expected:.6g}", f"{number:.4g}", None, None) for number, expected in pairs))


def verdict(final: Mapping[str, float], base: Mapping[str, float], answers: HeldOutAnswers | None) -> Verdict | None:
    """No nearer to the numbers than their mean."""
    return "not above the mean" if final.get("r2", 1.0) <= 0 else None


def report(found: Mapping[int, np.ndarray], rows: EvalRows) -> ClassReport:
    """The rows with the largest differences."""
    predicted, expected = _both(found, rows)
    return ClassReport(mistakes=mistakes(replies(found, rows), rows, np.abs(predicted - expected).tolist()))


def _both(found: Mapping[int, np.ndarray], rows: EvalRows) -> tuple[np.ndarray, np.ndarray]:
    """The predicted and the right number of each row."""
    right = rows.tokens.column("labels")[list(found)]
    return stacked(found)[:, 0].astype(np.float64), right.astype(np.float64)


def predict(run: Trained, texts: Iterable[str | tuple[str, str]]) -> Iterator[PredictedNumber]:
    """The number of each text, in order; those of `asked`."""
    for example, logits in asked(run, texts, lambda text, pair: Labelled(text, "", pair)):
        yield PredictedNumber(example.text, float(logits[0]), example.pair)
