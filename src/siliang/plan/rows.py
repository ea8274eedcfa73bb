"""The rows of a run's heaviest step, from its data or synthetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from siliang.config import RunConfig
from siliang.data.tokens import TokenSet
from siliang.engine.batches import StepCollator, in_steps, lengths_of, sequences_of
from siliang.engine.order import Order, shares
from siliang.tasks import TASKS

MOST_STEPS = 20_000  # looked through: seconds of work, and what lies behind them is of the same rows


@dataclass
class StepRows:
    """The rows of one optimizer step.

    Attributes:
        rows: As the collator takes them.
        tokens_per_epoch: Of all rows; None where there is no data.
        lengths: Tokens of each row of the data; of its sequences, where a row is several.
        windows: Rows are texts, which a shorter max_length makes more windows of.
    """

    rows: list[dict[str, Any]]
    tokens_per_epoch: int | None = None
    lengths: np.ndarray | None = None
    windows: bool = False

    @property
    def longest(self) -> int | None:
        """Tokens of the longest row of the data; None where there is none."""
        return None if self.lengths is None else int(self.lengths.max(initial=0))

    def cut_by(self, max_length: int) -> int:
        """How many rows that length would cut."""
        return 0 if self.lengths is None else int((self.lengths > max_length).sum())


def heaviest_step(config: RunConfig, tokens: TokenSet, collator: StepCollator, ranks: int = 1) -> StepRows:
    """The step with the largest batch, of those that the run will make, in its order; of several ranks, the share of
    the one that has this batch.

    Args:
        collator: Splits a step's rows into batches, as the run's own will.
    """
    t, lengths = config.train, tokens.lengths
    found, worst = list(range(min(len(tokens), t.batch_size))), -1
    known = lengths.tolist()
    for rows in (share for step in order(config, lengths) for share in shares(known, step, ranks)):
        for part in collator.split([tokens.outline(i) for i in rows]):
            cost = collator.cost_of([length for row in part for length in lengths_of(row)])
            if cost > worst:
                worst, found = cost, rows
    return StepRows(tokens.__getitems__(found), int(lengths.sum()), tokens.sequence_lengths)


def order(config: RunConfig, lengths: np.ndarray) -> Iterator[list[int]]:
    """The rows of each step, as the run will draw them."""
    sampler, steps = Order.of(config, lengths.tolist()), min(config.train.steps(len(lengths)), MOST_STEPS)
    epoch = made = 0
    while made < steps:
        sampler.set_epoch(epoch)
        for rows in in_steps(list(sampler), sampler.step):
            if made == steps:
                return
            yield list(rows)
            made += 1
        epoch += 1


def synthetic_rows(config: RunConfig, ranks: int = 1) -> StepRows:
    """As many rows of max_length as a rank has in a step, every token learned; two batches show what a step of more
    takes."""
    t = config.train
    row = synthetic_row(config, config.data.max_length)
    share = -(-t.rows_per_step // ranks)
    return StepRows([dict(row) for _ in range(min(share, 2 * t.batch_size))])


def synthetic_row(config: RunConfig, length: int) -> dict[str, Any]:
    """A row of so many tokens, every one of them learned."""
    return TASKS[config.task].synthetic_row(length, config.data.max_target_length)


def cut(row: dict[str, Any], length: int) -> dict[str, Any]:
    """A row's first so many tokens; of several sequences, each one's."""
    if "sequences" in row:
        parts = [cut(part, length) for part in sequences_of(row)]
        columns = {name: [x for part in parts for x in part[name]] for name in parts[0] if isinstance(row[name], list)}
        return row | columns | {"sequences": [len(part["input_ids"]) for part in parts]}
    return {name: value[:length] if isinstance(value, list) else value for name, value in row.items()}
