"""The base model's values of every sequence of a run that tunes the whole model, taken before its first step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import chain

from siliang.engine.batches import StepCollator
from siliang.engine.step import Engine
from siliang.engine.whole_step import keep_reference
from siliang.language import both
from siliang.train.measuring import batches_of
from siliang.train.types import Run


def take_reference(
    run: Run, engine: Engine, collator: StepCollator, autocast: Callable[[], AbstractContextManager[None]]
) -> None:
    """Fills the engine's store where it can be filled at no later time; every rank must call this. Each rank computes
    a share."""
    store = engine.reference_store
    if store is None or not store.only_before:
        return
    # the held-out rows last: those that are training rows, too, keep the values of the batches of evaluations
    sets = [run.train_set, run.eval_set]
    rows = sum(map(len, sets))
    run.listener.say(
        both(
            f"reference  the base model's log-probabilities of {rows:,} rows, once before the first step",
            f"参考模型   第一步之前计算一次基座模型对 {rows:,} 条样本的对数概率",
        )
    )
    batches = chain.from_iterable(batches_of(run, tokens, collator) for tokens in sets)
    keep_reference(engine, run.model, batches, autocast)
    store.merge(run.ranks.gather(store.state_dict()) if run.ranks.size > 1 else [])
