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
    """Each row as often as its source weighs. Of a weight's part behind the point, as many rows of the source as that
    is, drawn by chance: an epoch has as many rows as the weights say."""
    chance = random.Random(seed)
    source_of = np.searchsorted(np.cumsum(sizes), chosen, side="right")
    rows = [np.flatnonzero(source_of == k) for k in range(len(sizes))]
    times = np.floor(weights).astype(int)[source_of]
    exact = [(w - math.floor(w)) * len(own) for w, own in zip(weights, rows, strict=True)]
    more = [math.floor(x + 1e-9) for x in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda k: more[k] - exact[k])
    for k in by_remainder[: max(0, round(sum(exact)) - sum(more))]:
        more[k] += 1
    for own, n in zip(rows, more, strict=True):
        times[chance.sample(own.tolist(), n)] += 1
    return np.repeat(chosen, times).tolist()
