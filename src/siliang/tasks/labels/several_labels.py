"""Any number of labels for a text: metrics, thresholds and predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from siliang.config import ClassificationConfig
from siliang.data.examples import SeveralLabels
from siliang.data.prepared import EvalRows
from siliang.language import both
from siliang.records import Verdict
from siliang.records.classes import Classification, ClassReport
from siliang.tasks.labels import losses, metrics
from siliang.tasks.labels.calibration import best_threshold, ece, sigmoid, temperature_of_labels
from siliang.tasks.labels.predictions import (
    asked,
    in_brackets,
    input_values,
    inputs_of,
    mistakes,
    most_probable,
    read_logits,
    replies_of,
    stacked,
    top_values,
)
from siliang.tasks.metrics import F1
from siliang.tasks.task import HeldOutAnswers, LabelHooks, Metric, Reply, Task, Trained

if TYPE_CHECKING:  # slow to import
    from siliang.data.tokens import TokenSet

F1_MICRO, SUBSET = Metric("f1_micro"), Metric("subset_accuracy")
BETWEEN, NONE = ", ", "no label"  # labels in one line


@dataclass(frozen=True)
class PredictedLabels:
    """The labels of a text.

    Attributes:
        probabilities: Of these labels.
        top: The most probable labels with their probabilities, where more than one was asked for.
    """

    text: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    pair: str | None = None
    top: tuple[tuple[str, float], ...] = ()
    probability: None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The text, or the two of a pair."""
        return inputs_of(self.text, self.pair)

    @property
    def predicted(self) -> str:
        """The labels in one line."""
        return (BETWEEN.join(self.labels) or both(NONE, "无标签")) + in_brackets(self.top)

    def values(self) -> dict[str, object]:
        """The same for JSON."""
        own = {"labels": list(self.labels), "probabilities": [round(p, 4) for p in self.probabilities]}
        return input_values(self.text, self.pair) | own | top_values(self.top)


@dataclass(frozen=True)
class LabelRule:
    """How logits become labels.

    Attributes:
        thresholds: Of each label, or one of all.
    """

    temperature: float
    thresholds: list[float] | float

    def chances(self, logits: np.ndarray) -> np.ndarray:
        """The probability of each label."""
        return sigmoid(logits / self.temperature)

    def predicted(self, logits: np.ndarray) -> np.ndarray:
        """1 for each predicted label."""
        return (self.chances(logits) >= np.asarray(self.thresholds)).astype(int)


def as_several_labels(task: Task, settings: ClassificationConfig, learned: Classification | None) -> Task:
    """The task with any number of labels a row."""
    weights = learned.class_weights if learned else None
    rule = rule_of(settings, learned)
    return replace(
        task,
        loss=partial(losses.several_of, weights, settings.focal_gamma),
        smooths_labels=False,
        read=read_logits,
        metrics=(F1_MICRO, F1, SUBSET),
        measure=partial(measure, rule),
        quality=F1_MICRO,
        majority=None,
        replies=partial(replies, rule),
        verdict=verdict,
        judged_by="answers",
        predict=partial(predict, rule),
        blank={"text": "", "labels": None, "probabilities": None},
        labels=LabelHooks(
            weights=balanced_weights, fit=partial(fit, settings), report=partial(report, rule), ranks=True
        ),
    )


def rule_of(settings: ClassificationConfig, learned: Classification | None) -> LabelRule:
    """The rule of a run; before anything was chosen for it, that of logits above 0."""
    fixed = 0.5 if settings.threshold == "auto" else settings.threshold
    temperature = (learned.temperature if learned else None) or 1.0
    return LabelRule(temperature, (learned.thresholds if learned else None) or fixed)


def in_line(labels: Iterable[str]) -> str:
    """Labels as one text; in English, as records are."""
    return BETWEEN.join(labels) or NONE


# ---- metrics ----


def measure(rule: LabelRule, found: Mapping[int, np.ndarray], rows: EvalRows) -> dict[str, float]:
    """F1 over labels, averaged over them, and the share of rows without a mistake."""
    return metrics.of_several(rule.predicted(stacked(found)), _labels(found, rows))


def replies(rule: LabelRule, found: Mapping[int, np.ndarray], rows: EvalRows) -> Iterator[tuple[int, Reply]]:
    """The labels of each text, with the least probability among all decisions on it."""
    if not found:
        return
    logits, labels = stacked(found), _labels(found, rows)
    chances = rule.chances(logits)
    sure = np.maximum(chances, 1 - chances).min(1).tolist()
    expected, predicted = (
        [in_line(rows.labels[n] for n in np.flatnonzero(row)) for row in array]
        for array in (labels, rule.predicted(logits))
    )
    answers = ((e, p, e == p, round(s, 4)) for e, p, s in zip(expected, predicted, sure, strict=True))
    yield from replies_of(found, rows, answers)


def verdict(final: Mapping[str, float], base: Mapping[str, float], answers: HeldOutAnswers | None) -> Verdict | None:
    """The same labels for all rows."""
    if answers is None or len(set(answers.expected)) < 2:
        return None
    return "one class" if len(set(answers.predicted)) == 1 else None


def report(rule: LabelRule, found: Mapping[int, np.ndarray], rows: EvalRows) -> ClassReport:
    """Each label, and the rows with the most confident wrong decision."""
    logits, labels = stacked(found), _labels(found, rows)
    predicted, chances = rule.predicted(logits), rule.chances(logits)
    wrong = np.where(predicted != labels, np.abs(chances - labels), 0.0).max(1)
    return ClassReport(
        classes=metrics.by_class(predicted, labels, rows.labels),
        mistakes=mistakes(replies(rule, found, rows), rows, wrong.tolist()),
    )


def _labels(found: Mapping[int, np.ndarray], rows: EvalRows) -> np.ndarray:
    """0 or 1 for each label, (N, C)."""
    lists = list(rows.tokens.lists("labels"))
    return np.stack([lists[entry] for entry in found]).astype(int)


# ---- what is chosen ----


def balanced_weights(tokens: TokenSet, classes: int) -> list[float]:
    """Rows without the label / rows with it; 1 for a label that no row, or every row, has."""
    having = np.zeros(classes)
    for row in tokens.lists("labels"):
        having += row
    n = len(tokens)
    return [float((n - k) / k) if 0 < k < n else 1.0 for k in having]


def fit(
    settings: ClassificationConfig, learned: Classification, found: Mapping[int, np.ndarray], rows: EvalRows
) -> Classification:
    """The temperature, and then the threshold of each label."""
    logits, labels = stacked(found).astype(np.float64), _labels(found, rows)
    if settings.calibrate:
        t = temperature_of_labels(logits, labels)
        before, after = (ece(p.ravel(), labels.ravel()) for p in (sigmoid(logits), sigmoid(logits / t)))
        learned = learned.model_copy(update={"temperature": t, "ece_before": before, "ece_after": after})
    if settings.threshold == "auto":
        chances = sigmoid(logits / (learned.temperature or 1.0))
        best = [best_threshold(chances[:, c], labels[:, c]) for c in range(labels.shape[1])]
        learned = learned.model_copy(update={"thresholds": best})
    return learned


# ---- use ----


def predict(rule: LabelRule, run: Trained, texts: Iterable[str | tuple[str, str]]) -> Iterator[PredictedLabels]:
    """The labels of each text, in order; those of `asked`."""
    for example, logits in asked(run, texts, lambda text, pair: SeveralLabels(text, (), pair)):
        chances, predicted = rule.chances(logits), np.flatnonzero(rule.predicted(logits)).tolist()
        labels = tuple(run.labels[i] for i in predicted)
        sure = tuple(float(chances[i]) for i in predicted)
        yield PredictedLabels(example.text, labels, sure, example.pair, most_probable(run, chances))
