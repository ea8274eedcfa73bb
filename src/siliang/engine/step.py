"""Forward pass and loss of one batch: the same numbers at the least cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from siliang.adapters.active_rows import trains_all_layers
from siliang.data.batch import Batch
from siliang.engine.batches import EVERYWHERE, SEPARATE, Sharing
from siliang.engine.budget import ADAM_STATE, MemoryBudget
from siliang.engine.forward_pass import ForwardPass
from siliang.engine.frozen import StopForwardError, frozen_cache
from siliang.engine.last_layer import Reads
from siliang.engine.noise import EmbeddingNoise
from siliang.engine.padding import PaddingFree
from siliang.engine.reads import find_reads
from siliang.engine.recompute import Recompute
from siliang.engine.reference_store import ReferenceStore
from siliang.engine.sharing import find_shares
from siliang.engine.splits import notes_on_splits
from siliang.engine.trial import ModelTrial
from siliang.engine.whole_step import Context, Gather, alone, log_probabilities, run_step
from siliang.language import Bilingual, together
from siliang.peft_api.model import PeftModel
from siliang.tasks import Task


class Engine:
    """Runs a model's batches.

    Attributes:
        recompute: Which layers keep their activations.
        frozen_layers: The number of lowest layers whose output is cached; 0 if that is off.
        shares: Where beginnings that sequences share are computed once.
        notes: The optimizations that are off, and why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        task: Task,
        *,
        packing: bool = True,
        share: Sharing = EVERYWHERE,
        memory_budget: int | Literal["auto"] | None = None,
        checkpointing: bool = False,
        keep_frozen: bool = False,
        frozen_tokens: Callable[[], int] | None = None,
        comparing: bool = True,
        keep_reference: bool = False,
        all_logits: str | None = None,
        memory_share: float = 1.0,
        state_share: float = ADAM_STATE,
        label_smoothing: float = 0.0,
        neftune_alpha: float | None = None,
        gradients: bool = True,
    ) -> None:
        """Tries which optimizations `model` allows. The model is unchanged outside of `loss`.

        Args:
            comparing: Compare the results of each optimization. False on fake tensors: it only has to run, and nothing
                is cached.
            keep_reference: Compute the values without the adapter once for each sequence, where the loss takes them. A
                model without an adapter always keeps them: `keep_reference` computes them before its first step.
            share: Where beginnings that sequences share may be computed once.
            all_logits: Why all logits are needed, if they are.
            frozen_tokens: Returns the tokens of all rows whose frozen layers' output will be cached.
            memory_share: This process's share of the free main memory, if several processes train on one machine.
            state_share: Bytes of the optimizer's state for each byte of a trained weight.
            label_smoothing: The share of a label that is spread over all classes or tokens, only in training.
            neftune_alpha: NEFTune's alpha; None for no noise.
            gradients: Compare the gradients of each optimization, too: `model` is to be trained, and has all its
                weights here.
        """
        self.task, self.label_smoothing = task, label_smoothing
        self._peft = model if isinstance(model, PeftModel) else None
        self.reference_store = None
        if task.step_loss is not None and task.step_loss.reference:
            only_before = self._peft is None and comparing  # a plan learns nothing
            if keep_reference or only_before:
                self.reference_store = ReferenceStore(only_before=only_before)
        self._pass = ForwardPass(model, task, all_logits=all_logits, comparing=comparing)
        self._base = self._pass.base
        self.notes: list[str] = []
        self.frozen_layers, self.shares = 0, SEPARATE
        self._reads: Reads | None = None
        budget = MemoryBudget(model, memory_budget, memory_share, state_share)
        self._noise = EmbeddingNoise(self._base.get_input_embeddings(), neftune_alpha) if neftune_alpha else None
        trial = ModelTrial(
            model, self._base, task, self._pass.tried, comparing=comparing, gradients=gradients and packing
        )
        with trial.running():
            if task.writes and comparing and all_logits is None:
                self._pass.compare_logits(trial)
            if packing and (reason := self._pass.find_packing(trial)) is not None:
                self._note(Bilingual("packing is off: ", "未启用无填充计算："), reason)
            padding = self.padding
            if padding is None and self._pass.head and comparing:
                self._pass.skip_logits(trial)
            self.notes += notes_on_splits(model)
            if padding and keep_frozen and not (self._peft and trains_all_layers(self._peft.injection)):
                noise = self._noise is not None
                padding.frozen, frozen = frozen_cache(trial, padding.layers, budget, frozen_tokens, noise=noise)
                self.frozen_layers = frozen.count
                what = Bilingual("the frozen layers are computed in every epoch: ", "冻结的层每个 epoch 都要计算：")
                self._note(what, frozen.why_not)
            if padding and share != SEPARATE:
                noise = neftune_alpha is not None
                self.shares, notes = find_shares(trial, padding, wanted=share, noise=noise)
                self.notes += notes
            what = Bilingual("the loss takes all logits: ", "计算损失时使用全部 logits：")
            self._note(what, self._pass.why_all_logits)
            if padding:
                pad = getattr(self._base.config, "pad_token_id", None)
                self._reads, reason = find_reads(trial, padding.last, pad)
                self._note(Bilingual("the last layer computes all tokens: ", "最后一层计算所有词元："), reason)
        self.recompute = Recompute(model, budget, always=checkpointing)

    @property
    def padding(self) -> PaddingFree | None:
        """Runs the model without padding; None if that is off."""
        return self._pass.padding

    def _note(self, what: str, reason: str | None) -> None:
        self.notes += [] if reason is None else [together(what, reason)]

    def run(
        self,
        model: nn.Module,
        batches: list[Batch],
        weight: float,
        *,
        autocast: Context = nullcontext,
        no_sync: Context = nullcontext,
        backward: Callable[[Tensor], object] = Tensor.backward,
        gather: Gather = alone,
    ) -> Tensor:
        """Forward and backward of one optimizer step.

        Args:
            weight: The divisor of the summed loss: labelled tokens, or rows, of the whole step.
            autocast: Returns the context of the computation.
            no_sync: Returns the context without gradient reduction, for all batches but the last.
            gather: Returns the values of each rank, for a loss of whole steps.

        Returns:
            The mean loss, a scalar.
        """
        device = next(model.parameters()).device
        if self.task.step_loss is not None:
            batches = [batch.to(device) for batch in batches]
            return run_step(self, self.task.step_loss, model, batches, weight, autocast, no_sync, backward, gather)
        mean = torch.zeros((), device=device)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with nullcontext() if last else no_sync(), autocast(), self.loss(model, batch.to(device)) as loss:
                loss = loss / weight
                backward(loss)
            mean += loss.detach()
        return mean

    def fill_frozen_cache(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Refills the cache of frozen layers' outputs for these batches, after a resume."""
        cache = self.padding.frozen if self.padding else None
        if cache is None:
            return
        cache.only_fill = True
        model.train()
        try:
            for batch in batches:
                if not all(key in cache.store for key in batch.keys):
                    with torch.no_grad(), suppress(StopForwardError), self.loss(model, batch):
                        pass
        finally:
            cache.only_fill = False

    @contextmanager
    def loss(self, model: nn.Module, batch: Batch) -> Iterator[Tensor]:
        """The summed loss of `batch`; divided by its weight it is the mean. Run backward within the block.

        Args:
            model: The module to call: the engine's model, or its wrapper of a distributed strategy.
        """
        with self.loss_and_output(model, batch) as (loss, _):
            yield loss

    @contextmanager
    def loss_and_output(self, model: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, ModelOutput | None]]:
        """The summed loss of `batch`, in fp32, and the model's output, with the logits of the padded batch.

        A language model gives no output: its logits over the vocabulary are not computed.
        """
        smoothing = self.label_smoothing if self._training else 0.0
        with self._running(batch):
            if batch.targets is None:
                output = model(**self._pass.inputs(batch))
                yield self._loss_of(output, batch, smoothing), output
            elif self._pass.head is None:
                rows, targets = self._pass.logits(model, batch), batch.targets[0]
                yield F.cross_entropy(rows.float(), targets, reduction="sum", label_smoothing=smoothing), None
            else:
                states, rows = self._pass.states(self._pass.head, model, batch)
                yield self._pass.head.loss(states, rows, batch.targets[0], smoothing), None

    @contextmanager
    def values(self, model: nn.Module, batch: Batch) -> Iterator[Tensor]:
        """The values of each sequence of `batch` for a loss of whole steps, (S, ...), in fp32. Run backward within the
        block."""
        step = self.task.step_loss
        assert step is not None
        with self._running(batch):
            if batch.targets is None:
                output = model(**self._pass.inputs(batch))
            elif self._pass.head is None:
                output = log_probabilities(self._pass.logits(model, batch), batch.targets[0])
            else:
                states, rows = self._pass.states(self._pass.head, model, batch)
                output = log_probabilities(self._pass.head.logits(states, rows), batch.targets[0])
            yield step.values(output, batch).float()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within the block, the model runs without its adapter if it has one, without dropout and gradients."""
        model = self._peft or self._base
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self._peft.disable_adapter() if self._peft else nullcontext():
                yield
        finally:
            model.train(training)

    @property
    def _training(self) -> bool:
        """The mode of the base model: `reference` does not set the mode of a distributed wrapper."""
        return self._base.training

    @contextmanager
    def _running(self, batch: Batch) -> Iterator[None]:
        """Within the block, all optimizations are on for this batch."""
        padding = self.padding
        frozen = padding.frozen if padding and self._training else None
        noise = self._noise if self._training else None
        share = self.shares.training if self._training else self.shares.evaluation
        tree = batch.tree if share else None
        tokens = (tree.tokens if tree else batch.tokens) if padding else batch.width * len(batch.lengths)
        read = self._reads(batch) if self._reads else None
        packed = (
            partial(padding.packed, share=share, tree=tree, keep_packed=self._pass.keeps_packed) if padding else None
        )
        uneven = read is not None and self.task.writes
        with (
            self._pass.fused.on(),
            noise.of(batch.lengths) if noise else nullcontext(),
            packed(batch.lengths, batch.width, read=read) if packed else nullcontext(),
            self.recompute.chosen(tokens, uneven=uneven) if torch.is_grad_enabled() else nullcontext(),
            frozen.batch(batch.keys) if frozen else nullcontext(),
        ):
            yield

    def attach(self) -> None:
        """Adds the hooks of its forward passes to the model again, after `detach`."""
        if self.padding is not None:
            self.padding.attach()

    def detach(self) -> None:
        """Removes these hooks from the model, and keeps what its trial has found."""
        if self.padding is not None:
            self.padding.close()

    def close(self) -> None:
        """Removes all hooks from the model."""
        if self.padding is not None:
            self.padding.close()
            self._pass.padding = None
        if self._noise is not None:
            self._noise.close()
            self._noise = None
        self.recompute.close()

    def _loss_of(self, output: ModelOutput, batch: Batch, smoothing: float) -> Tensor:
        """The loss of the task, in fp32, summed over what `batch.weight` counts."""
        assert self.task.loss is not None
        smoothed = {"label_smoothing": smoothing} if smoothing else {}
        loss = self.task.loss(output, batch, **smoothed)
        return loss if batch.weight else loss * 0.0  # a dummy batch counts nothing
