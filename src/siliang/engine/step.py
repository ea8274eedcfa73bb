"""Forward pass and loss of one batch: the same numbers at the least cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from siliang.adapters.active_rows import active_rows, trains_all_layers, trial_inputs
from siliang.data.batch import Batch
from siliang.data.task_column import TASK_IDS
from siliang.engine.batches import EVERYWHERE, SEPARATE, Sharing
from siliang.engine.budget import ADAM_STATE, MemoryBudget
from siliang.engine.causal import check_causal
from siliang.engine.frozen import FrozenCache, FrozenLayers, StateStore, StopForwardError, find_frozen_layers
from siliang.engine.fused import FusedModules
from siliang.engine.head_loss import HeadLoss
from siliang.engine.noise import EmbeddingNoise
from siliang.engine.padding import NotPackableError, PaddingFree
from siliang.engine.reads import ReadingTrial, Reads, tensors_of
from siliang.engine.recompute import Recompute
from siliang.engine.reference_store import ReferenceStore
from siliang.engine.sharing import find_shares
from siliang.engine.splits import notes_on_splits
from siliang.engine.whole_step import Context, Gather, alone, log_probabilities, run_step
from siliang.language import Bilingual, together
from siliang.models.introspect import output_layer
from siliang.ops.layout import Layout
from siliang.peft_api.model import PeftModel
from siliang.tasks import Task
from siliang.types import message_of


class Engine:
    """Runs a model's batches.

    Attributes:
        padding: Runs the model without padding; None if that is off.
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
        """
        self.task, self.label_smoothing = task, label_smoothing
        self._peft = model if isinstance(model, PeftModel) else None
        self.reference_store = None
        if task.step_loss is not None and task.step_loss.reference:
            only_before = self._peft is None and comparing  # a plan learns nothing
            if keep_reference or only_before:
                self.reference_store = ReferenceStore(only_before=only_before)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(base, PreTrainedModel)
        self._base = base
        self._trial = trial_inputs(self._peft.injection) if self._peft else {}
        self._default = {} if comparing else self._trial
        self.padding: PaddingFree | None = None
        self.notes: list[str] = []
        vocabulary = getattr(self._base.config.get_text_config(), "vocab_size", 32)
        if packing:
            try:
                self.padding = PaddingFree(self._base)
                self.padding.readers += active_rows(self._peft.injection) if self._peft else []
                reason = self.padding.why_not(model, vocabulary, comparing=comparing, **self._trial)
            except NotPackableError as error:
                reason = message_of(error)
            if reason is not None:
                self.notes.append(together(Bilingual("packing is off: ", "未启用无填充计算："), reason))
                if self.padding is not None:
                    self.padding.close()
                    self.padding = None
        self.notes += notes_on_splits(model)
        self.frozen_layers = 0
        budget = MemoryBudget(model, memory_budget, memory_share, state_share)
        self._noise = EmbeddingNoise(self._base.get_input_embeddings(), neftune_alpha) if neftune_alpha else None
        if keep_frozen and self.padding is not None and not (self._peft and trains_all_layers(self._peft.injection)):
            frozen = find_frozen_layers(self._base, self.padding.layers, comparing=comparing)
            if frozen.count and self._noise is not None:
                frozen = FrozenLayers(0, Bilingual("train.neftune_alpha adds noise", "train.neftune_alpha 会加入噪声"))
            self.frozen_layers = frozen.count
            if frozen.count and comparing:
                store = StateStore.within(budget, frozen_tokens() if frozen_tokens else None)
                self.padding.frozen = FrozenCache(self.padding.layers, frozen.count, store)
                budget.promised = store.promised
            elif frozen.why_not:
                what = Bilingual("the frozen layers are computed in every epoch: ", "冻结的层每个 epoch 都要计算：")
                self.notes.append(together(what, frozen.why_not))
        self.shares = SEPARATE
        if self.padding is not None and share != SEPARATE:
            noise = neftune_alpha is not None
            self.shares, notes = find_shares(
                model, self.padding, vocabulary, wanted=share, noise=noise, comparing=comparing, **self._trial
            )
            self.notes += notes
        self._fused = FusedModules(self._base)
        self.recompute = Recompute(model, budget, always=checkpointing)
        head = output_layer(self._base) if task.writes else None
        if task.has_encoder and not hasattr(self._base, "prepare_decoder_input_ids_from_labels"):
            head = None  # its forward needs the labels, and so all logits
        if task.decoder_only and comparing and all_logits is None:
            check_causal(model, vocabulary, **self._trial)
        self._head = HeadLoss(self._base, head) if head is not None else None
        if self._head and (
            reason := all_logits or (self._head.differs(model, vocabulary, **self._trial) if comparing else None)
        ):
            self.notes.append(together(Bilingual("the loss takes all logits: ", "计算损失时使用全部 logits："), reason))
            self._head = None
        self._reads: Reads | None = None
        if self.padding is not None:
            pad = getattr(self._base.config, "pad_token_id", None)
            trial = ReadingTrial(self.padding.last, self._results, model, task, vocabulary, pad)
            self._reads, reason = trial.find(comparing=comparing)
            if reason is not None:
                what = Bilingual("the last layer computes all tokens: ", "最后一层计算所有词元：")
                self.notes.append(together(what, reason))

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
                output = model(**self._inputs(batch))
                yield self._loss_of(output, batch, smoothing), output
            elif self._head is None:
                rows, targets = self._logits(model, batch), batch.targets[0]
                yield F.cross_entropy(rows.float(), targets, reduction="sum", label_smoothing=smoothing), None
            else:
                states, rows = self._states(self._head, model, batch)
                yield self._head.loss(states, rows, batch.targets[0], smoothing), None

    @contextmanager
    def values(self, model: nn.Module, batch: Batch) -> Iterator[Tensor]:
        """The values of each sequence of `batch` for a loss of whole steps, (S, ...), in fp32. Run backward within the
        block."""
        step = self.task.step_loss
        assert step is not None
        with self._running(batch):
            if batch.targets is None:
                output = model(**self._inputs(batch))
            elif self._head is None:
                output = log_probabilities(self._logits(model, batch), batch.targets[0])
            else:
                states, rows = self._states(self._head, model, batch)
                output = log_probabilities(self._head.logits(states, rows), batch.targets[0])
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

    @property
    def _keeps_packed(self) -> bool:
        """Whether the output layer gets packed states."""
        return self.padding is not None and self.padding.head_takes_packed and self._head is not None

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
        packed = partial(padding.packed, share=share, tree=tree, keep_packed=self._keeps_packed) if padding else None
        uneven = read is not None and self.task.writes
        with (
            self._fused.on(),
            noise.of(batch.lengths) if noise else nullcontext(),
            packed(batch.lengths, batch.width, read=read) if packed else nullcontext(),
            self.recompute.chosen(tokens, uneven=uneven) if torch.is_grad_enabled() else nullcontext(),
            frozen.batch(batch.keys) if frozen else nullcontext(),
        ):
            yield

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits of the labelled tokens, (N, V), from the model's output layer."""
        logits = model(**self._inputs(batch), use_cache=False).logits
        return logits.flatten(0, 1).index_select(0, self._rows(logits, batch, None))

    def _states(self, head: HeadLoss, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The input of the output layer, and its rows of labelled tokens."""
        with head.skipped() as seen:
            model(**self._inputs(batch), use_cache=False)
        layout = self.padding.layout if self.padding and self._keeps_packed else None
        if layout is not None and self.padding and self.padding.last.layout is not None:  # all that are there are read
            return seen[0], torch.arange(seen[0].shape[1], device=seen[0].device)
        return seen[0], self._rows(seen[0], batch, layout)

    def _results(self, batch: Batch, reads: Reads | None) -> list[Tensor]:
        """What is read of the model's output, in a trial."""
        model, before = self._peft or self._base, (self._reads, self._default)
        self._reads, self._default = reads, self._trial
        try:
            with self._running(batch):
                if batch.targets is None:
                    output = model(**self._inputs(batch))
                    step = self.task.step_loss
                    return tensors_of(output) if step is None else [step.values(output, batch)]
                if self._head is None:
                    return [self._logits(model, batch)]
                states, rows = self._states(self._head, model, batch)
                return [states.flatten(0, -2)[rows]]
        finally:
            self._reads, self._default = before

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """The model's arguments: without labels, so that the model computes no loss."""
        unused = {*self.task.data.targets, *(() if self._trial else (TASK_IDS,))}
        inputs = self._default | {name: x for name, x in batch.inputs.items() if name not in unused}
        if self.task.has_encoder:
            labels = batch.inputs["labels"]
            # a model without this method (M2M100) shifts the labels only in its forward
            shift = getattr(self._base, "prepare_decoder_input_ids_from_labels", None)
            inputs |= {"labels": labels} if shift is None else {"decoder_input_ids": shift(labels)}
        return inputs

    def close(self) -> None:
        """Removes all hooks from the model."""
        if self.padding is not None:
            self.padding.close()
            self.padding = None
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

    def _rows(self, states: Tensor, batch: Batch, layout: Layout | None) -> Tensor:
        """The indices, in the flattened states (packed or not), of the states that predict the targets."""
        assert batch.targets is not None
        if self.task.has_encoder:  # the decoder's states, without virtual tokens
            return batch.targets[1] * states.shape[1] + batch.targets[2]
        if layout is not None:
            virtual, starts = layout.width - batch.width, layout.starts
            if layout.tree is not None:
                return layout.places[batch.targets[1], virtual + batch.targets[2]]
        else:
            virtual = states.shape[1] - batch.width
            starts = tuple(range(0, len(batch.lengths) * states.shape[1], states.shape[1]))
        first = torch.tensor(starts).to(states.device, non_blocking=True)
        return first[batch.targets[1]] + virtual + batch.targets[2]
