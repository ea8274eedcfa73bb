"""Figures of held-out rows: their bounds, and which end of each is the better one."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import AfterValidator, Field

from siliang.records.saved import Name, Number

SHARES = ("accuracy", "f1", "precision", "recall", "exact_match", "rouge_l")  # figures from 0 to 1
LOWER_IS_BETTER = ("loss", "eval_loss", "perplexity")  # of every other figure, more is better
LARGEST_LOSS = 1e30
SLACK = 1e-6  # of rounding


def higher_is_better(figure: str) -> bool:
    """The direction of a figure of a run's held-out rows."""
    return figure not in LOWER_IS_BETTER


def better(figure: str, new: float, old: float | None) -> bool:
    """Whether a figure's new value is better than its old one, or than none at all (None); a number is better than
    NaN."""
    if old is None or math.isnan(old):
        return old is None or not math.isnan(new)
    return new > old if higher_is_better(figure) else new < old


def _figures(found: dict[str, float]) -> dict[str, float]:
    for name, value in found.items():
        highest = 1.0 if name in SHARES else LARGEST_LOSS if "loss" in name else math.inf
        if math.isfinite(highest) and math.isfinite(value) and not -SLACK <= value <= highest + SLACK:
            raise ValueError(f"{name} must be from 0 to {highest:g}")
    return found


Figures = Annotated[dict[Name, Number], Field(max_length=100), AfterValidator(_figures)]
