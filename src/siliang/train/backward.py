"""Forward and backward of one optimizer step, on one rank or several; in smaller batches where it does not fit."""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from siliang.data.batch import Batch
from siliang.data.encode import IGNORED
from siliang.data.tokens import TokenSet
from siliang.distributed import deepspeed
from siliang.distributed.sharding import average_gradients, is_sharded, no_sync
from siliang.engine.batches import StepCollator
from siliang.engine.method_hooks import extra_loss
from siliang.engine.random_state import random_state, set_random_state
from siliang.engine.splits import mixing, result_of_a_split
from siliang.engine.step import Engine
from siliang.engine.whole_step import alone
from siliang.language import both
from siliang.train.errors import out_of_memory_error
from siliang.train.types import Run


class Backward:
    """Leaves the gradient of a step's mean loss in the model.

    Args:
        collator: That makes the batches; with `train.fit` it makes smaller ones after a step that did not fit.
    """

    def __init__(self, run: Run, engine: Engine, accelerator: Accelerator, collator: StepCollator) -> None:
        self._run, self._engine, self._accelerator, self._collator = run, engine, accelerator, collator
        self._fit = run.config.train.fit
        self.use(run.train_set)

    def use(self, tokens: TokenSet) -> None:
        """Takes the rows of the steps to come."""
        rows_count = self._engine.task.step_loss is not None
        self._tokens = tokens
        self._labelled = labelled(tokens, rows=rows_count) if self._run.ranks.size > 1 else None

    def __call__(self, model: nn.Module, shares: list[list[int]], batches: list[Batch], step: int) -> Tensor:
        """The step's mean loss, a scalar, the same on every rank.

        Args:
            shares: The step's rows by rank.
            batches: Of this rank's rows.
            step: Its number, from 1.

        Raises:
            DeviceMemoryError: It does not fit the device.
        """
        weight = self._weight(shares, batches)
        if is_sharded(model) or self._run.zero_stage:
            batches = with_dummies(batches, self._most_batches(shares))
        before = random_state() if self._fit else None
        while True:
            try:
                loss = self._run_batches(model, batches, weight)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # outside of the handler: the error holds on to what it had computed
            batches = self._smaller(model, batches, step)
            assert before is not None
            set_random_state(before)
        if self._run.ranks.size > 1:  # the mean over all ranks: all see the same, and so stop together
            mean = self._accelerator.reduce(loss, "mean")
            assert isinstance(mean, Tensor)
            return mean
        return loss

    def _weight(self, shares: list[list[int]], batches: list[Batch]) -> float:
        """The divisor of this rank's summed loss: with it the mean of the ranks' gradients is that of all
        labelled tokens. Each rank computes the counts of the others from their rows."""
        counts = [own := sum(batch.weight for batch in batches)]
        if self._labelled is not None:
            counts = [sum(int(self._labelled[i]) for i in share if i >= 0) for share in shares]
            assert counts[self._run.ranks.rank] == own, (counts, own)
        return max(sum(counts), 1) / len(counts)

    def _most_batches(self, shares: list[list[int]]) -> int:
        """The batches of the rank that has the most."""
        own = [[max(i, ~i) for i in share] for share in shares]
        if self._collator.shares.training:  # the split follows from the tokens
            rows = (self._tokens.__getitems__(share) for share in own)
        else:
            rows = ([self._tokens.outline(i) for i in share] for share in own)
        return max(len(self._collator.split(share)) for share in rows)

    def _run_batches(self, model: nn.Module, batches: list[Batch], weight: float) -> Tensor:
        loss = self._engine.run(
            model,
            batches,
            weight,
            autocast=lambda: self._accelerator.autocast(),
            no_sync=lambda: self._no_sync(model),
            backward=self._accelerator.backward,
            gather=self._run.ranks.gather if self._run.ranks.size > 1 else alone,
        )
        if is_sharded(model):
            average_gradients(model)
        # after the exchange of gradients, since it is the same on every rank
        if (term := extra_loss(model)) is not None:
            self._accelerator.backward(term)
        return loss

    def _no_sync(self, model: nn.Module) -> AbstractContextManager[object]:
        """The context in which gradients are accumulated and not reduced over the ranks."""
        if self._run.zero_stage:
            return deepspeed.no_sync(self._accelerator)
        return no_sync(model) if is_sharded(model) else self._accelerator.no_sync(model)

    def _smaller(self, model: nn.Module, batches: list[Batch], step: int) -> list[Batch]:
        """A step's rows in smaller batches, or the same with every layer recomputed; so are those of the steps to come.

        With several ranks neither is possible: the others are in the middle of this step, and would wait forever for a
        rank that starts it again.

        Raises:
            DeviceMemoryError: train.fit is off, or no smaller batch exists.
        """
        run = self._run
        model.zero_grad()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        halves = [half for batch in batches for half in batch.halves()]
        tokens = max(batch.tokens for batch in batches)
        fit = self._fit and run.ranks.size == 1
        if fit and len(halves) > len(batches):
            self._collator.narrow_to(halves)
            at_once, result = self._collator.tokens_at_once, result_of_a_split(mixing(run.model))
            run.listener.say(
                both(
                    f"memory     step {step:,} did not fit in batches of up to {tokens:,} tokens: from now on, up to "
                    f"{at_once:,}, with {result}",
                    f"内存       第 {step:,} 步放不下 {tokens:,} 个词元的批次：此后每批最多 {at_once:,} 个，"
                    f"{result.zh}",
                )
            )
            return halves
        if fit and self._engine.recompute.recompute_all():
            run.listener.say(
                both(
                    f"memory     step {step:,} did not fit by rows: from now on every layer recomputes",
                    f"内存       第 {step:,} 步逐条也放不下：此后所有层都重新计算激活值",
                )
            )
            return batches
        raise out_of_memory_error(run, self._engine, step, tokens)


def labelled(tokens: TokenSet, *, rows: bool = False) -> np.ndarray:
    """What each row adds to the weight of its batch: labelled tokens; or 1, of all tasks with `rows`."""
    if rows:
        return np.ones(len(tokens), dtype=np.int64)
    if not tokens.spec.next_token:
        return tokens.learned
    # the first token is predicted by none
    return np.array([np.count_nonzero(row[1:] != IGNORED) for row in tokens.lists("labels")], dtype=np.int64)


def with_dummies(batches: list[Batch], number: int) -> list[Batch]:
    """So many batches, of which the first are dummies: every rank needs the same number where layers are gathered for
    each batch, or DeepSpeed sends its gradients."""
    # in front: the last batch is the one whose gradients are sent
    missing = number - len(batches)
    return [min(batches, key=lambda batch: batch.tokens).dummy()] * missing + batches


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the machine, has no memory left."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in text
