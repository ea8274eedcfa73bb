"""Metrics on held-out rows, and their bounds."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import AfterValidator, Field

from siliang.language import Bilingual
from siliang.records.saved import Name, Number

SHARES = (
    "accuracy",
    "f1",
    "precision",
    "recall",
    "exact_match",
    "rouge_l",
    "ndcg_at_10",
    "recall_at_1",
    "recall_at_10",
    "mrr_at_10",
)  # metrics from 0 to 1
LARGEST_LOSS = 1e30
SLACK = 1e-6  # of rounding


def _checked(found: dict[str, float]) -> dict[str, float]:
    for name, value in found.items():
        highest = 1.0 if name in SHARES else LARGEST_LOSS if "loss" in name else math.inf
        if math.isfinite(highest) and math.isfinite(value) and not -SLACK <= value <= highest + SLACK:
            raise ValueError(Bilingual(f"{name} must be from 0 to {highest:g}", f"{name} 应在 0 到 {highest:g} 之间"))
    return found


Metrics = Annotated[dict[Name, Number], Field(max_length=100), AfterValidator(_checked)]
