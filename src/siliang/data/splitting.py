"""Which rows are held out, and how often a row of a weighted source is there."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np

from siliang.language import Bilingual
from siliang.types import DataError


def split(n: int, test_size: float, seed: int, labels: list[int] | None = None) -> tuple[list[int], list[int]]:
    """(training rows, held-out rows), the same as Dataset.train_test_split gives for this size and seed.

    Args:
        labels: The class of each row, of which each part gets the same share.

    Raises:
        DataError: A class is too small to be split.
    """
    held = math.ceil(test_size * n)
    if labels is None and 0 < test_size < 1 and held < n:  # without `datasets`, which takes half a second to import
        order = np.random.default_rng(seed).permutation(n).tolist()
        return order[held:], order[:held]
    from datasets import ClassLabel, Dataset, disable_progress_bars

    disable_progress_bars()
    rows = Dataset.from_dict({"row": list(range(n))})
    by: str | None = None
    if labels is not None:
        by = "label"
        rows = rows.add_column("label", labels).cast_column("label", ClassLabel(num_classes=max(labels) + 1))
    try:
        parts = rows.train_test_split(test_size, seed=seed, stratify_by_column=by)
    except ValueError as error:
        raise DataError(
            Bilingual(
                f"data.test_size = {test_size} with data.stratify: {str(error).rstrip('.')}.",
                f"data.test_size = {test_size} 与 data.stratify 不能同时满足：{str(error).rstrip('.')}。",
            )
        ) from None
    return parts["train"]["row"][:], parts["test"]["row"][:]


def mixed(sizes: Sequence[int], weights: Sequence[float], temperature: float) -> list[float]:
    """How often each row of each source is used in an epoch that mixes the sources by temperature.

    p_i = w_i n_i^(1/T) / sum_j w_j n_j^(1/T), as in T5 and multilingual BERT: T = 1 mixes by size, and a large T mixes
    all sources alike. An epoch keeps its sum_j w_j n_j rows.

    Args:
        sizes: Rows of each source.
        weights: Of each source.
    """
    parts = [w * n ** (1 / temperature) if n else 0.0 for n, w in zip(sizes, weights, strict=True)]
    rows = sum(n * w for n, w in zip(sizes, weights, strict=True))
    whole = sum(parts)
    return [part / whole * rows / n if n else 0.0 for n, part in zip(sizes, parts, strict=True)]


def weighted(chosen: list[int], sizes: list[int], weights: list[float], seed: int) -> list[int]:
    """Each row as often as its source weighs; the part of a weight behind the point by chance."""
    chance = random.Random(seed)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    rows: list[int] = []
    for i in chosen:
        weight = weights[next(k for k, end in enumerate(ends) if i < end)]
        times = math.floor(weight) + (chance.random() < weight - math.floor(weight))
        rows += [i] * times
    return rows
