"""The heaviest step of a run that computes shared beginnings once, against all of its steps."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from token_sets import token_set

from siliang.config import RunConfig
from siliang.data.collate import PadCollator
from siliang.engine.batches import Sharing, StepCollator
from siliang.engine.order import shares
from siliang.plan.rows import heaviest_step, order
from siliang.tasks import CAUSAL_LM


def assert_heaviest(ids: list[list[int]], most: int | None, ranks: int = 1, **train: Any) -> None:
    config = RunConfig.build({"model": "m", "task": "causal_lm", "data": {"train": "d"}, "output": "o", "train": train})
    tokens = token_set(ids)
    collator = StepCollator(PadCollator(0), CAUSAL_LM, config.train.batch_size, most)
    sharing = replace(collator, shares=Sharing(training=True))

    def largest(rows: list[dict[str, Any]]) -> int:
        return max(map(sharing.cost, sharing([dict(row) for row in rows])["batches"]))

    found = heaviest_step(config, tokens, collator, ranks).sharing
    lengths = tokens.lengths.tolist()
    steps = (part for step in order(config, tokens) for part in shares(lengths, step, ranks) if part)
    assert found is not None and largest(found) == max(largest(tokens.__getitems__(part)) for part in steps)


GROUPED = [{}, {"group_by_length": True}, {"group_by_beginnings": True}]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([None, 30, 60, 100]), st.sampled_from([1, 2]), st.sampled_from(GROUPED))
def test_it_has_the_largest_batch(seed: int, most: int | None, ranks: int, grouped: dict[str, bool]) -> None:
    rng = random.Random(seed)
    tops = [[i] * rng.randint(16, 40) for i in (5, 6)]
    ids = [
        (rng.choice(tops) if rng.random() < 0.6 else []) + rng.choices(range(7, 90), k=rng.randint(1, 50))
        for _ in range(rng.randint(2, 14))
    ]
    assert_heaviest(ids, most, ranks, batch_size=2, gradient_accumulation=2, max_steps=4, seed=seed % 7, **grouped)


def test_the_heaviest_may_be_one_that_shares_nothing() -> None:
    """Four rows of 210 tokens, of which 200 are shared, beside four of 150."""
    shared = [[5] * 200 + [i] * 10 for i in range(10, 14)]
    others = [[i] * 150 for i in range(20, 24)]
    assert_heaviest(shared + others, None, batch_size=4, epochs=1)


def test_of_many_steps_those_that_share_least_are_read() -> None:
    """Steps of 840 tokens of which 240 are computed, beside some of fewer tokens and several prompts."""
    shared = [[5 + i] * 200 + [i, j] * 5 for i in range(300) for j in range(310, 314)]
    others = [[1000 + i] * 90 for i in range(4)]
    assert_heaviest(shared + others, None, batch_size=4, epochs=1, group_by_beginnings=True)


def test_the_time_of_an_epoch_is_by_what_it_computes() -> None:
    """Six prompts of 100 tokens before four rows of 10 each, in steps of four."""
    tokens = token_set([[5 + i] * 100 + [20 + j] * 10 for i in range(6) for j in range(4)])
    values = {"model": "m", "task": "causal_lm", "data": {"train": "d"}, "output": "o"}
    shares = []
    for grouped in (False, True):
        train = {"batch_size": 4, "epochs": 1, "group_by_beginnings": grouped}
        config = RunConfig.build(values | {"train": train})
        collator = StepCollator(PadCollator(0), CAUSAL_LM, 4)
        assert heaviest_step(config, tokens, collator).computed_share is None
        shares.append(heaviest_step(config, tokens, collator, timed=True).computed_share)
    assert shares[0] is not None and shares[0] > 0.7
    assert shares[1] == (100 + 4 * 10) / (4 * 110)
