"""The rows of a run's heaviest step, from its data or synthetic."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from siliang.config import RunConfig
from siliang.data.row_beginnings import row_beginnings
from siliang.data.tokens import TokenSet
from siliang.engine.batches import (
    MOST_COMPARED,
    Sharing,
    StepCollator,
    distinct_tokens,
    in_steps,
    lengths_of,
    sequences_of,
)
from siliang.engine.order import Order, shares
from siliang.language import Bilingual
from siliang.tasks import task_of

MOST_STEPS = 20_000  # steps to search, which takes seconds; later steps consist of the same rows
MOST_READ = 200  # steps of which the tokens are read, the heaviest by an estimate: a millisecond each
MEAN_OF = 40  # steps, by which the share of an epoch is known


@dataclass
class StepRows:
    """The rows of one optimizer step.

    Attributes:
        rows: The collator's input.
        sharing: The same where shared beginnings are computed once, which may be of another step.
        tokens_per_epoch: Tokens of all rows; None without data.
        lengths: Tokens of each row of the data, or of each sequence if a row has several; None without data.
        cached_tokens: Tokens of all different rows if the run has several epochs: it may cache the outputs of its
            frozen layers.
        computed_share: Of the tokens of an epoch, where shared beginnings are computed once; None: it is not needed.
        note: What another order of the rows would save there; None where that is little, or was not looked for.
        windows: Long texts become windows; a shorter max_length makes more of them.
    """

    rows: list[dict[str, Any]]
    tokens_per_epoch: int | None = None
    lengths: np.ndarray | None = None
    cached_tokens: int = 0
    windows: bool = False
    sharing: list[dict[str, Any]] | None = None
    computed_share: float | None = None
    note: Bilingual | None = None

    @property
    def longest(self) -> int | None:
        """Tokens of the longest row of the data; None without data."""
        return None if self.lengths is None else int(self.lengths.max(initial=0))

    def cut_by(self, max_length: int) -> int:
        """The number of rows that this length would cut."""
        return 0 if self.lengths is None else int((self.lengths > max_length).sum())


def heaviest_step(
    config: RunConfig, tokens: TokenSet, collator: StepCollator, ranks: int = 1, *, timed: bool = False
) -> StepRows:
    """The run's step with the largest batch. With several ranks: the share of the rank that has this batch.

    Args:
        collator: Splits a step's rows into batches, as in the run.
        timed: Find `computed_share`, too.
    """
    t, lengths = config.train, tokens.lengths
    heaviest, highest_cost = list(range(min(len(tokens), t.batch_size))), -1
    row_lengths = lengths.tolist()
    steps = [share for step in order(config, tokens) for share in shares(row_lengths, step, ranks)]
    for rows in steps:
        for part in collator.split([tokens.outline(i) for i in rows]):
            cost = collator.cost_of([length for row in part for length in lengths_of(row)])
            if cost > highest_cost:
                highest_cost, heaviest = cost, rows
    again = t.keep_frozen and ranks == 1 and t.steps(len(tokens)) > t.steps_per_epoch(len(tokens))
    cached = distinct_tokens(tokens) if again else 0
    found = StepRows(tokens.__getitems__(heaviest), int(lengths.sum()), tokens.sequence_lengths, cached)
    if t.share_beginnings:
        collator = replace(collator, shares=Sharing(training=True))
        found.sharing = _heaviest_sharing(tokens, collator, steps)
        found.computed_share = _computed_share(tokens, collator, steps) if timed else None
    return found


def _heaviest_sharing(tokens: TokenSet, collator: StepCollator, steps: list[list[int]]) -> list[dict[str, Any]] | None:
    """The rows with the largest batch, where shared beginnings are computed once; None without steps.

    Args:
        collator: Shares them.
        steps: The rows of a rank in each step.
    """

    def largest(step: int) -> int:
        return max(map(collator.cost, collator(tokens.__getitems__(steps[step]))["batches"]))

    if not steps:
        return None
    lengths = tokens.lengths
    most = [sum(heapq.nlargest(collator.rows_at_once, lengths[rows].tolist())) for rows in steps]  # of any batch
    heaviest = max(range(len(steps)), key=most.__getitem__)
    highest_cost = largest(heaviest)
    if highest_cost < most[heaviest]:
        about = most
        if len(tokens) <= MOST_COMPARED:
            about = np.minimum(most, row_beginnings(tokens).computed(steps)).tolist()
        for i in heapq.nlargest(MOST_READ, range(len(steps)), key=about.__getitem__):
            if most[i] > highest_cost and (cost := largest(i)) > highest_cost:
                heaviest, highest_cost = i, cost
    return tokens.__getitems__(steps[heaviest])


def _computed_share(tokens: TokenSet, collator: StepCollator, steps: list[list[int]]) -> float:
    """The share of the tokens of some steps that is computed where shared beginnings are computed once."""
    some = [rows for rows in steps[:: -(-len(steps) // MEAN_OF) or 1] if rows]
    batches = [batch for rows in some for batch in collator(tokens.__getitems__(rows))["batches"]]
    return sum(map(collator.cost, batches)) / max(sum(batch.tokens for batch in batches), 1)


def order(config: RunConfig, tokens: TokenSet) -> Iterator[list[int]]:
    """The rows of each step, in the run's order."""
    sampler, steps = Order.of(config, tokens), min(config.train.steps(len(tokens)), MOST_STEPS)
    epoch = step = 0
    while step < steps:
        sampler.set_epoch(epoch)
        for rows in in_steps(list(sampler), sampler.step):
            if step == steps:
                return
            yield list(rows)
            step += 1
        epoch += 1


def synthetic_rows(config: RunConfig, ranks: int = 1) -> StepRows:
    """A rank's rows of a step, of max_length each, with a label on every token.

    At most two batches: a step of more batches has the same peak.
    """
    t = config.train
    row = synthetic_row(config, config.data.max_length)
    share = -(-t.rows_per_step // ranks)
    return StepRows([dict(row) for _ in range(min(share, 2 * t.batch_size))])


def synthetic_row(config: RunConfig, length: int) -> dict[str, Any]:
    """A row of `length` tokens with a label on every token."""
    return task_of(config).synthetic_row(length, config.data.max_target_length)


def cut(row: dict[str, Any], length: int) -> dict[str, Any]:
    """The first `length` tokens of a row, or of each of its sequences."""
    if "sequences" in row:
        parts = [cut(part, length) for part in sequences_of(row)]
        columns = {name: [x for part in parts for x in part[name]] for name in parts[0] if isinstance(row[name], list)}
        return row | columns | {"sequences": [len(part["input_ids"]) for part in parts]}
    return {name: value[:length] if isinstance(value, list) else value for name, value in row.items()}
