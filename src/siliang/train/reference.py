"""The base model's values of every sequence of a run that tunes the whole model, taken before its first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from siliang.data.batch import Batch
from siliang.data.tokens import TokenSet
from siliang.engine.batches import StepCollator, in_steps
from siliang.engine.order import shared_steps
from siliang.engine.step import Engine
from siliang.engine.whole_step import keep_reference
from siliang.language import both
from siliang.train.measuring import as_many_as_other_ranks
from siliang.train.types import Run


def take_reference(
    run: Run, engine: Engine, collator: StepCollator, autocast: Callable[[], AbstractContextManager[None]]
) -> None:
    """Fills the engine's store where it can be filled at no later time; every rank must call this. Each rank computes
    a share."""
    store = engine.reference_store
    if store is None or not store.only_before:
        return
    # last, so that they come from the batches of evaluations, also where a row is among the training rows
    sets = [run.train_set, run.eval_set]
    rows = sum(map(len, sets))
    run.listener.say(
        both(
            f"reference  the base model's log-probabilities of {rows:,} rows, once before the first step",
            f"参考模型   第一步之前计算一次基座模型对 {rows:,} 条样本的对数概率",
        )
    )
    keep_reference(engine, run.model, _batches(run, sets, collator), autocast)
    store.merge(run.ranks.gather(store.state_dict()) if run.ranks.size > 1 else [])


def _batches(run: Run, sets: list[TokenSet], collator: StepCollator) -> Iterator[Batch]:
    """This rank's share."""
    ranks, as_many = run.ranks, as_many_as_other_ranks(run)
    for tokens in sets:
        if ranks.size == 1:
            steps = in_steps(range(len(tokens)), collator.rows_at_once)
        else:
            lengths = tokens.lengths.tolist()
            every = shared_steps(range(len(lengths)), lengths, run.config.train.rows_per_step, ranks.size)
            steps = (shares[ranks.rank] for shares in every)
        for step in steps:
            yield from as_many(collator.numbered(tokens, step))
