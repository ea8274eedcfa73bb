"""Metrics of several labels, of ordered classes and of numbers, and the table of the classes.

Spearman's correlation is scipy's. The others are a few lines: scikit-learn takes one column of labels for two classes,
absent and present, and warns, or gives NaN, where all values are equal; the tests compare them with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from siliang.records.classes import LONGEST_NAME, MOST_CLASSES, MOST_IN_TABLE, ClassMetrics
from siliang.secrets import shortened
from siliang.tasks.metrics import spearman


def of_several(predicted: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """F1 over all labels (micro), averaged over labels (macro), and the share of rows whose labels are all right.

    Args:
        predicted: 0 or 1, (N, C); `reference` likewise.
    """
    counts = ClassCounts.of_labels(predicted, reference)
    exact = float((predicted == reference).all(1).mean())
    return {"f1_micro": float(counts.total().f1[0]), "f1": float(counts.f1.mean()), "subset_accuracy": exact}


@dataclass(frozen=True)
class ClassCounts:
    """Of each class, (C,): rows that have it and get it (true positives), that get it, and that have it."""

    both: np.ndarray
    predicted: np.ndarray
    reference: np.ndarray

    @classmethod
    def of_labels(cls, predicted: np.ndarray, reference: np.ndarray) -> ClassCounts:
        """From 0 or 1 for each label, (N, C)."""
        return cls((predicted & reference).sum(0), predicted.sum(0), reference.sum(0))

    @classmethod
    def of_classes(cls, predicted: np.ndarray, reference: np.ndarray, classes: int) -> ClassCounts:
        """From numbers of classes, (N,)."""
        found = (predicted[predicted == reference], predicted, reference)
        return cls(*(np.bincount(numbers, minlength=classes) for numbers in found))

    def total(self) -> ClassCounts:
        """The sums over all classes, (1,)."""
        return ClassCounts(*(n.sum(keepdims=True) for n in (self.both, self.predicted, self.reference)))

    @property
    def precision(self) -> np.ndarray:
        return _ratio(self.both, self.predicted)

    @property
    def recall(self) -> np.ndarray:
        return _ratio(self.both, self.reference)

    @property
    def f1(self) -> np.ndarray:
        return _ratio(2 * self.both, self.predicted + self.reference)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """0 where both are 0."""
    return above / np.maximum(below, 1)


def of_ordered(predicted: np.ndarray, reference: np.ndarray, classes: int) -> dict[str, float]:
    """The mean distance of classes, and Cohen's kappa with quadratic weights."""
    return {
        "mae": float(np.abs(predicted - reference).mean()),
        "kappa": quadratic_kappa(predicted, reference, classes),
    }


def quadratic_kappa(predicted: np.ndarray, reference: np.ndarray, classes: int) -> float:
    """1 - the squared distances of classes / those by chance; 0 where the latter are 0."""
    distances = np.subtract.outer(np.arange(classes), np.arange(classes)) ** 2
    found, right = (np.bincount(numbers, minlength=classes) / len(numbers) for numbers in (predicted, reference))
    by_chance = float((distances * np.outer(right, found)).sum())
    return 1 - float(((predicted - reference) ** 2).mean()) / by_chance if by_chance else 0.0


def of_numbers(predicted: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Mean squared error, mean absolute error, Spearman's rank correlation, and R squared."""
    errors = predicted - reference
    spread = float(((reference - reference.mean()) ** 2).mean())
    mse = float((errors**2).mean())
    return {
        "mse": mse,
        "mae": float(np.abs(errors).mean()),
        "spearman": spearman(predicted.tolist(), reference.tolist()),
        "r2": 1 - mse / spread if spread else 0.0,
    }


def by_class(predicted: np.ndarray, reference: np.ndarray, names: Sequence[str]) -> list[ClassMetrics]:
    """Precision, recall and F1 of each class; of too many, of those with the most rows.

    Args:
        predicted: Numbers of classes, (N,), or 0 or 1 for each label, (N, C); `reference` likewise.
    """
    if predicted.ndim == 2:
        counts = ClassCounts.of_labels(predicted, reference)
    else:
        counts = ClassCounts.of_classes(predicted, reference, len(names))
    columns = (counts.reference, counts.predicted, counts.precision, counts.recall, counts.f1)
    shown = np.sort(np.argsort(-counts.reference, kind="stable")[:MOST_CLASSES])
    return [
        ClassMetrics(name=shortened(names[i], LONGEST_NAME), rows=n, predicted=m, precision=p, recall=r, f1=f)
        for i, n, m, p, r, f in zip(shown.tolist(), *(column[shown].tolist() for column in columns), strict=True)
    ]


def confusion(predicted: np.ndarray, reference: np.ndarray, classes: int) -> list[list[int]] | None:
    """Rows by (right class, predicted class); None of too many classes."""
    if classes > MOST_IN_TABLE:
        return None
    table = np.zeros((classes, classes), int)
    np.add.at(table, (reference, predicted), 1)
    return table.tolist()
