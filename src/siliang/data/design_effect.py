"""How much more the labels of steps vary from step to step if the rows of a step are alike than if they are random.

Where labels depend on what the rows of a step have in common (their length, their beginning), the rows of a step have
nearly the same labels, and less is learned.
"""

from __future__ import annotations

import numpy as np

from siliang.data.tokens import TokenSet

MOST_EFFECT = 2.5  # with 2.0 as much was learned as from random rows (docs/log.md)
MOST_SAMPLED = 10_000  # rows by which it is judged


def harmful_effect(tokens: TokenSet, step: int, order: np.ndarray | None = None) -> float | None:
    """The design effect of steps of rows that are alike where that is too much; None where it is not.

    Args:
        order: As of `design_effect`.
    """
    steps = max(min(len(tokens), MOST_SAMPLED) // step, 1)
    by_chance = 3 * (2 / steps) ** 0.5  # three standard deviations of the effect where there is none
    effect = design_effect(tokens, step, order)
    return effect if effect > max(MOST_EFFECT, 1 + by_chance) else None


def design_effect(tokens: TokenSet, step: int, order: np.ndarray | None = None) -> float:
    """How many times as much the labels of a step vary from step to step if its rows are alike, and not random:
    step * Var(mean label of a step) / Var(label), both summed over the labels (Kish 1965).

    1 where labels do not depend on what is alike, `step` where they follow from it; 1 also for entries without a label
    of their own.

    Args:
        order: All rows, so that those that are alike follow one another. None: by length.
    """
    if order is None:
        rows = np.random.default_rng(0).permutation(len(tokens))[:MOST_SAMPLED]  # those of one length in random order
        rows = rows[np.argsort(tokens.lengths[rows], kind="stable")]
    else:  # whole neighbourhoods: a sample of single rows would have less in common
        steps = len(order) // step
        some = np.random.default_rng(0).permutation(steps)[: max(MOST_SAMPLED // step, 2)]
        rows = order[: steps * step].reshape(steps, step)[np.sort(some)].flatten()
    rows = rows[: len(rows) // step * step]
    if tokens.spec.targets != ("labels",) or tokens.spec.label_per_token or step == 1 or len(rows) < 2 * step:
        return 1.0
    labels = np.array(tokens.table.select_columns(["labels"])[rows.tolist()]["labels"])
    if tokens.spec.columns["labels"].kind == "int32":  # a class becomes 0 or 1 for each class
        names, numbers = np.unique(labels, return_inverse=True)
        labels = np.eye(len(names), dtype=np.float32)[numbers]
    labels = labels.reshape(len(rows), -1)
    variance = float(labels.var(0).sum())
    return step * float(labels.reshape(-1, step, labels.shape[1]).mean(1).var(0).sum()) / variance if variance else 1.0
