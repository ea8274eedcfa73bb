"""What is chosen for predictions when the training is over: a temperature, and a threshold for each label.

Temperature: Guo et al. 2017 (arXiv 1706.04599), the T with the smallest negative log-likelihood of softmax(z / T), or
of sigmoid(z / T) for several labels. ECE, the same paper's eq. 3: over 15 bins of confidence, the mean difference of
confidence and accuracy, weighted by the rows of the bins.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BINS = 15
STEEPEST, FLATTEST = 20.0, 0.001  # of 1 / T: where all rows are right, none is the best
HALVINGS = 60
NO_SLOPE = 1e-12  # where all rows are right, rounding makes 0 of it before the end


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in double precision."""
    z = logits.astype(np.float64)
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """In double precision."""
    return 0.5 * (1 + np.tanh(logits.astype(np.float64) / 2))


def temperature_of_classes(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature of one class a row.

    Args:
        logits: (N, C).
        labels: Numbers of classes, (N,).
    """
    right = logits[np.arange(len(labels)), labels]

    def slope(a: float) -> float:
        return float(((softmax(a * logits) * logits).sum(-1) - right).mean())

    return _temperature(slope)


def temperature_of_labels(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature of several labels a row.

    Args:
        logits: (N, C).
        labels: 0 or 1, (N, C).
    """
    return _temperature(lambda a: float(((sigmoid(a * logits) - labels) * logits).mean()))


def _temperature(slope: Callable[[float], float]) -> float:
    """1 / a for the a at which the slope of the likelihood, which grows with a, is 0."""
    low, high = FLATTEST, STEEPEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < NO_SLOPE else (low, middle)
    return 2 / (low + high)


def at_the_end(temperature: float) -> bool:
    """Whether a temperature is the highest or the lowest that is looked for: the rows say nothing of the best one."""
    return temperature >= 0.99 / FLATTEST or temperature <= 1.01 / STEEPEST


def ece(confidence: np.ndarray, correct: np.ndarray) -> float:
    """The expected calibration error.

    Args:
        confidence: Probabilities, (N,).
        correct: Whether what has this probability is right, (N,).
    """
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=correct.astype(np.float64) - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def best_threshold(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The threshold of one label with the highest F1; of equal ones the one nearest to 0.5, which is also that of a
    label that no row has.

    Args:
        probabilities: (N,).
        labels: 0 or 1, (N,).
    """
    order = np.argsort(-probabilities, kind="stable")
    p, y = probabilities[order], labels[order]
    if not y.sum():
        return 0.5
    given = np.arange(1, len(p) + 1)
    f1 = 2 * np.cumsum(y) / (given + y.sum())
    below = np.append(p[1:], 0.0)
    f1[below == p] = -1.0  # rows of one probability are on one side
    cuts = (p + below) / 2
    best = f1 >= f1.max() - 1e-12
    return float(min(cuts[best], key=lambda cut: abs(cut - 0.5)))
