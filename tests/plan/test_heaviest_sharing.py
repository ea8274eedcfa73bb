"""The heaviest step of a run that computes shared beginnings once, against all of its steps."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from siliang.config import RunConfig
from siliang.data.collate import PadCollator
from siliang.data.tokens import TokenSet
from siliang.engine.batches import Sharing, StepCollator
from siliang.engine.order import shares
from siliang.plan.rows import heaviest_step, order
from siliang.tasks import CAUSAL_LM


@dataclass
class Tokens:
    """The part of a token set that is used."""

    ids: list[list[int]]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.ids])

    sequence_lengths = lengths

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        return [{"input_ids": self.ids[i], "labels": self.ids[i], "row": i} for i in numbers]

    def outline(self, i: int) -> dict[str, Any]:
        return {"input_ids": range(len(self.ids[i]))}


def assert_heaviest(ids: list[list[int]], most: int | None, ranks: int = 1, **train: Any) -> None:
    config = RunConfig.build({"model": "m", "task": "causal_lm", "data": {"train": "d"}, "output": "o", "train": train})
    tokens = cast("TokenSet", Tokens(ids))
    collator = StepCollator(PadCollator(0), CAUSAL_LM, config.train.batch_size, most)
    sharing = replace(collator, shares=Sharing(training=True))

    def largest(rows: list[dict[str, Any]]) -> int:
        return max(map(sharing.cost, sharing([dict(row) for row in rows])["batches"]))

    found = heaviest_step(config, tokens, collator, ranks).sharing
    lengths = tokens.lengths.tolist()
    steps = (part for step in order(config, tokens) for part in shares(lengths, step, ranks) if part)
    assert found is not None and largest(found) == max(largest(tokens.__getitems__(part)) for part in steps)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([None, 30, 60, 100]), st.sampled_from([1, 2]), st.booleans())
def test_it_has_the_largest_batch(seed: int, most: int | None, ranks: int, by_length: bool) -> None:
    rng = random.Random(seed)
    tops = [[i] * rng.randint(16, 40) for i in (5, 6)]
    ids = [
        (rng.choice(tops) if rng.random() < 0.6 else []) + rng.choices(range(7, 90), k=rng.randint(1, 50))
        for _ in range(rng.randint(2, 14))
    ]
    assert_heaviest(
        ids, most, ranks, batch_size=2, gradient_accumulation=2, max_steps=4, group_by_length=by_length, seed=seed % 7
    )


def test_the_heaviest_may_be_one_that_shares_nothing() -> None:
    """Four rows of 210 tokens, of which 200 are shared, beside four of 150."""
    shared = [[5] * 200 + [i] * 10 for i in range(10, 14)]
    others = [[i] * 150 for i in range(20, 24)]
    assert_heaviest(shared + others, None, batch_size=4, epochs=1)
