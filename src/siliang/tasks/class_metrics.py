"""Metrics of several labels, of ordered classes and of numbers, and the table of the classes.

F1 and its parts are scikit-learn's. The others are a few lines, for scikit-learn and scipy warn, or give NaN, where all
values are equal; the tests compare them with both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from siliang.records.classes import MOST_IN_TABLE, ClassMetrics
from siliang.tasks.metrics import ZERO


def of_several(predicted: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """F1 over all labels (micro), averaged over labels (macro), and the share of rows whose labels are all right.

    Args:
        predicted: 0 or 1, (N, C); `reference` likewise.
    """
    from sklearn.metrics import f1_score

    micro: Any = f1_score(reference, predicted, average="micro", zero_division=ZERO)
    macro: Any = f1_score(reference, predicted, average="macro", zero_division=ZERO)
    exact = float((predicted == reference).all(1).mean())
    return {"f1_micro": float(micro), "f1": float(macro), "subset_accuracy": exact}


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
        "spearman": spearman(predicted, reference),
        "r2": 1 - mse / spread if spread else 0.0,
    }


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of the ranks, equal values having their mean rank; 0 where all are equal."""
    x, y = (ranks - ranks.mean() for ranks in map(_ranks, (a, b)))
    size = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / size if size else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def by_class(predicted: np.ndarray, reference: np.ndarray, names: Sequence[str]) -> list[ClassMetrics]:
    """Precision, recall and F1 of each class.

    Args:
        predicted: Numbers of classes, (N,), or 0 or 1 for each label, (N, C); `reference` likewise.
    """
    from sklearn.metrics import precision_recall_fscore_support

    labels = list(range(len(names)))
    found: Any = precision_recall_fscore_support(reference, predicted, labels=labels, average=None, zero_division=ZERO)
    precision, recall, f1, rows = found
    given = predicted.sum(0) if predicted.ndim == 2 else np.bincount(predicted, minlength=len(names))
    return [
        ClassMetrics(name=name, rows=int(n), predicted=int(m), precision=float(p), recall=float(r), f1=float(f))
        for name, n, m, p, r, f in zip(names, rows, given, precision, recall, f1, strict=True)
    ]


def confusion(predicted: np.ndarray, reference: np.ndarray, classes: int) -> list[list[int]] | None:
    """Rows by (right class, predicted class); None of too many classes."""
    if classes > MOST_IN_TABLE:
        return None
    table = np.zeros((classes, classes), int)
    np.add.at(table, (reference, predicted), 1)
    return table.tolist()
