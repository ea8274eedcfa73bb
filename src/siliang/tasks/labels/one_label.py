"""One class for a text: its metrics, what is chosen when the training is over, and predictions; also of ordered
classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from siliang.config import ClassificationConfig
from siliang.data.examples import Labelled
from siliang.data.prepared import EvalRows
from siliang.language import both
from siliang.records import Verdict
from siliang.records.classes import Classification, ClassReport
from siliang.tasks.labels import losses, metrics
from siliang.tasks.labels.calibration import ece, softmax, temperature_of_classes
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
from siliang.tasks.metrics import ACCURACY, F1, MAE, classification
from siliang.tasks.task import HeldOutAnswers, LabelHooks, Metric, Reply, Task, Trained

if TYPE_CHECKING:  # slow to import
    from siliang.data.tokens import TokenSet

KAPPA = Metric("kappa")
SLACK = 1e-9  # of metrics that are equal but for rounding


@dataclass(frozen=True)
class PredictedClass:
    """The class of a text, and how sure the model is of it.

    Attributes:
        label: None: below the confidence that the run, or the caller, asks for.
        probability: Of the most probable class.
        top: The most probable classes with their probabilities, where more than one was asked for.
    """

    text: str
    label: str | None
    probability: float
    pair: str | None = None
    top: tuple[tuple[str, float], ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The text, or the two of a pair."""
        return inputs_of(self.text, self.pair)

    @property
    def predicted(self) -> str:
        """The class."""
        label = both("no label", "无标签") if self.label is None else self.label
        return label + in_brackets(self.top)

    def values(self) -> dict[str, object]:
        """The same for JSON."""
        own = {"label": self.label, "probability": round(self.probability, 4)}
        return input_values(self.text, self.pair) | own | top_values(self.top)


def as_one_label(task: Task, settings: ClassificationConfig, learned: Classification | None) -> Task:
    """The task with one class a row."""
    weights = learned.class_weights if learned else None
    ordered = settings.problem == "ordered"
    loss = partial(losses.ordered, weights) if ordered else partial(losses.one_of, weights, settings.focal_gamma)
    temperature = (learned.temperature if learned else None) or 1.0
    return replace(
        task,
        loss=loss,
        smooths_labels=not ordered and settings.focal_gamma is None,
        read=read_logits,
        metrics=(ACCURACY, F1, KAPPA, MAE) if ordered else (ACCURACY, F1),
        measure=partial(measure, settings, temperature),
        quality=KAPPA if ordered else ACCURACY,
        majority=majority,
        replies=partial(replies, temperature),
        verdict=verdict,
        judged_by="answers",
        predict=partial(predict, settings, temperature),
        blank={"text": "", "label": None, "probability": None},
        labels=LabelHooks(
            weights=balanced_weights,
            fit=partial(fit, settings),
            report=partial(report, temperature),
            ranks=True,
            abstains=True,
        ),
    )


# ---- metrics ----


def measure(
    settings: ClassificationConfig, temperature: float, found: Mapping[int, np.ndarray], rows: EvalRows
) -> dict[str, float]:
    """Accuracy and F1; of ordered classes their distance too; where some get no label, the share of those that do, and
    the accuracy on them, if there are any."""
    logits, labels = stacked(found), _labels(found, rows)
    numbers = logits.argmax(1)
    values = classification(numbers.tolist(), labels.tolist())
    if settings.problem == "ordered":
        values |= metrics.of_ordered(numbers, labels, logits.shape[1])
    if settings.min_confidence:
        sure = softmax(logits / temperature).max(1) >= settings.min_confidence
        values["coverage"] = float(sure.mean())
        if sure.any():
            values["accuracy_covered"] = float((numbers == labels)[sure].mean())
    return values


def majority(rows: EvalRows) -> float | None:
    """The share of the rows that have the most frequent class."""
    shares = Counter(rows.tokens.column("labels").tolist())
    return max(shares.values()) / shares.total() if shares else None


def replies(temperature: float, found: Mapping[int, np.ndarray], rows: EvalRows) -> Iterator[tuple[int, Reply]]:
    """The class of each text."""
    if not found:
        return
    chances = softmax(stacked(found) / temperature)
    predicted, expected = chances.argmax(1).tolist(), _labels(found, rows).tolist()
    names, sure = rows.labels, chances.max(1).tolist()
    answers = ((names[e], names[p], e == p, round(s, 4)) for e, p, s in zip(expected, predicted, sure, strict=True))
    yield from replies_of(found, rows, answers)


def verdict(final: Mapping[str, float], base: Mapping[str, float], answers: HeldOutAnswers | None) -> Verdict | None:
    """One class for all rows, or no more correct than always giving the most frequent one."""
    if answers is None:
        return None
    if (answers.classes or 0) > 1 and len(set(answers.expected)) > 1 and len(set(answers.predicted)) == 1:
        return "one class"
    if answers.majority is not None and final.get("accuracy", 1.0) <= answers.majority + SLACK:
        return "majority"
    return None


def report(temperature: float, found: Mapping[int, np.ndarray], rows: EvalRows) -> ClassReport:
    """Each class, the confusion matrix, and the wrong rows with the highest probabilities."""
    logits, labels = stacked(found), _labels(found, rows)
    numbers = logits.argmax(1)
    sure = softmax(logits / temperature).max(1).tolist()
    return ClassReport(
        classes=metrics.by_class(numbers, labels, rows.labels),
        confusion=metrics.confusion(numbers, labels, len(rows.labels)),
        mistakes=mistakes(replies(temperature, found, rows), rows, sure),
    )


def _labels(found: Mapping[int, np.ndarray], rows: EvalRows) -> np.ndarray:
    return rows.tokens.column("labels")[list(found)]


# ---- what is chosen ----


def balanced_weights(tokens: TokenSet, classes: int) -> list[float]:
    """rows / (classes x rows of the class); 1 for a class without rows."""
    counts = np.bincount(tokens.column("labels"), minlength=classes)
    return [float(counts.sum() / (classes * n)) if n else 1.0 for n in counts]


def fit(
    settings: ClassificationConfig, learned: Classification, found: Mapping[int, np.ndarray], rows: EvalRows
) -> Classification:
    """The temperature, and the calibration error before and after it."""
    if not settings.calibrate:
        return learned
    logits, labels = stacked(found).astype(np.float64), _labels(found, rows)
    temperature = temperature_of_classes(logits, labels)
    before, after = (
        ece(chances.max(1), chances.argmax(1) == labels) for chances in map(softmax, (logits, logits / temperature))
    )
    return learned.model_copy(update={"temperature": temperature, "ece_before": before, "ece_after": after})


# ---- use ----


def predict(
    settings: ClassificationConfig, temperature: float, run: Trained, texts: Iterable[str | tuple[str, str]]
) -> Iterator[PredictedClass]:
    """The most probable class of each text, in order; those of `asked`."""
    least = settings.min_confidence if run.min_confidence is None else run.min_confidence
    for example, logits in asked(run, texts, lambda text, pair: Labelled(text, "", pair)):
        chances = softmax(logits / temperature)
        best = int(chances.argmax())
        label = run.labels[best] if chances[best] >= least else None
        yield PredictedClass(example.text, label, float(chances[best]), example.pair, most_probable(run, chances))
