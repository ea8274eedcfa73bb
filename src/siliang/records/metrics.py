"""Metrics on held-out rows, and their bounds."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import AfterValidator, Field

from siliang.language import Bilingual
from siliang.records.saved import Name, Number

SHARES = (  # metrics from 0 to 1
    *("accuracy", "f1", "precision", "recall", "exact_match", "rouge_1", "rouge_2", "rouge_l"),
    *("ndcg_at_10", "recall_at_1", "recall_at_10", "mrr_at_10"),
    *("f1_micro", "subset_accuracy", "coverage", "accuracy_covered"),
)
PERCENT = ("bleu", "chrf")  # from 0 to 100
LARGEST_LOSS = 1e30
SLACK = 1e-6  # of rounding


def _checked(found: dict[str, float]) -> dict[str, float]:
    for name, value in found.items():
        share = name in SHARES or name.startswith("f1_")
        highest = 1.0 if share else 100.0 if name in PERCENT else LARGEST_LOSS if "loss" in name else math.inf
        if math.isfinite(highest) and math.isfinite(value) and not -SLACK <= value <= highest + SLACK:
            raise ValueError(Bilingual(f"{name} must be from 0 to {highest:g}", f"{name} 应在 0 到 {highest:g} 之间"))
    return found


Metrics = Annotated[dict[Name, Number], Field(max_length=1000), AfterValidator(_checked)]
