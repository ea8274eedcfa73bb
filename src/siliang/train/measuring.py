"""The metrics of the held-out rows in training; they depend on neither batches nor ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

from accelerate import Accelerator

from siliang.data.batch import Batch
from siliang.data.tokens import TokenSet
from siliang.distributed.sharding import is_sharded
from siliang.engine.batches import StepCollator
from siliang.engine.evaluate import Sums, evaluate, metrics_of
from siliang.engine.order import evaluation_batches
from siliang.engine.random_state import random_state, set_random_state
from siliang.engine.step import Engine
from siliang.engine.written import measure_texts
from siliang.train.backward import with_dummies
from siliang.train.types import Run


def batches_of(run: Run, tokens: TokenSet, collator: StepCollator) -> Iterator[Batch]:
    """This rank's batches of an evaluation, with dummies where every rank needs the same number."""

    def as_many(batches: list[Batch]) -> list[Batch]:
        if not is_sharded(run.model) and not run.zero_stage:
            return batches
        return with_dummies(batches, max(n for (n,) in run.ranks.gather_ints(len(batches))))

    ranks, step = run.ranks, run.config.train.rows_per_step
    return evaluation_batches(tokens, collator, ranks=ranks.size, rank=ranks.rank, step=step, as_many=as_many)


def measure(run: Run, engine: Engine, collator: StepCollator, accelerator: Accelerator) -> dict[str, float]:
    """The metrics of the held-out rows; every rank must call this. The signatures of measures of texts go into the
    record. The random states are restored, so that the training does not change."""
    ranks, task = run.ranks, engine.task

    def autocast() -> AbstractContextManager[None]:
        return accelerator.autocast()

    before = random_state()
    try:
        own = evaluate(
            run.model,
            engine,
            run.eval_set,
            collator,
            batches=batches_of(run, run.eval_set, collator),
            reader=task.read,
            autocast=autocast,
        )
        run.sums = Sums.of(ranks.gather(own))
        metrics = metrics_of(task, run.sums, run.eval_rows)
        texts = measure_texts(run.model, run.tokenizer, run.config, task, run.eval_rows, autocast=autocast, ranks=ranks)
    finally:
        set_random_state(before)
    run.record.signatures = dict(texts.signatures)
    return {**metrics, **texts.values}
