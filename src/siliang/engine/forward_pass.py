"""The model's forward pass of a batch, as far as the loss needs it, and what is found out about it by a trial: whether
it runs without padding, and whether the loss does without all logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from siliang.adapters.active_rows import active_rows, trial_inputs
from siliang.data.batch import Batch
from siliang.data.task_column import TASK_IDS
from siliang.engine.causal import check_causal, reads_back
from siliang.engine.fused import FusedModules
from siliang.engine.head_loss import HeadLoss
from siliang.engine.padding import NotPackableError, PaddingFree
from siliang.engine.patches import patched
from siliang.engine.splits import mixing
from siliang.engine.trial import PACKED, PADDED, PLAIN, ModelTrial, Output, Way, trial_error
from siliang.engine.trial_batch import of_tokens
from siliang.language import Bilingual
from siliang.models.introspect import backbone, output_layer
from siliang.ops.layout import Layout
from siliang.ops.stored import is_fake
from siliang.peft_api.model import PeftModel
from siliang.tasks import Task
from siliang.types import message_of

PACKED_ROWS, PADDED_ROWS = Bilingual("packed rows", "打包的样本"), Bilingual("padded ones", "填充的样本")
WITHOUT_LOGITS = Bilingual("without all its logits", "在不取全部 logits 时运行")
ENDS = ("start_logits", "end_logits")  # of each token, (S, W)


class ForwardPass:
    """The forward pass of one model.

    Attributes:
        base: The base model; `peft`: the model with its adapters, if it has any.
        fused: Its fused modules.
        padding: Runs the model without padding; None if that is off.
        head: Computes the loss without all logits; None if that is off.
        why_all_logits: Why that is off for a model that writes; None if it is not.
    """

    def __init__(
        self, model: PreTrainedModel, task: Task, *, all_logits: str | None = None, comparing: bool = True
    ) -> None:
        """
        Args:
            all_logits, comparing: As of the engine.
        """
        self.task = task
        self.peft = model if isinstance(model, PeftModel) else None
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(base, PreTrainedModel)
        self.base = base
        self.fused = FusedModules(base)
        self.padding: PaddingFree | None = None
        self._trial = trial_inputs(self.peft.injection) if self.peft else {}
        self._default = {} if comparing else self._trial
        head = output_layer(base) if task.writes else None
        if task.has_encoder and not hasattr(base, "prepare_decoder_input_ids_from_labels"):
            head = None  # its forward needs the labels, and so all logits
        self.head = HeadLoss(base, head) if head is not None and all_logits is None else None
        self.why_all_logits = all_logits if head is not None else None
        self._made: object = None  # by the model's body, in a trial

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The model's arguments: without labels, so that the model computes no loss."""
        unused = {*self.task.data.targets, *(() if self._trial else (TASK_IDS,))}
        inputs = self._default | {name: x for name, x in batch.inputs.items() if name not in unused}
        if self.task.has_encoder:
            labels = batch.inputs["labels"]
            # a model without this method (M2M100) shifts the labels only in its forward
            shift = getattr(self.base, "prepare_decoder_input_ids_from_labels", None)
            inputs |= {"labels": labels} if shift is None else {"decoder_input_ids": shift(labels)}
        return inputs

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits of the labelled tokens, (N, V), from the model's output layer."""
        logits = model(**self.inputs(batch), use_cache=False).logits
        return logits.flatten(0, 1).index_select(0, self.rows(logits, batch, None))

    def states(self, head: HeadLoss, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The input of the output layer, and its rows of labelled tokens."""
        with head.skipped() as seen:
            model(**self.inputs(batch), use_cache=False)
        layout = self.padding.layout if self.padding and self.keeps_packed else None
        if layout is not None and self.padding and self.padding.last.layout is not None:  # all that are there are read
            return seen[0], torch.arange(seen[0].shape[1], device=seen[0].device)
        return seen[0], self.rows(seen[0], batch, layout)

    def tried(self, batch: Batch, way: Way) -> Output:
        """What the model gives for the sequences of a trial."""
        model, before, padding = self.peft or self.base, self._default, self.padding if way.packed else None
        self._default = self._trial
        read = way.reads(batch) if way.reads else None
        packed = partial(padding.packed, share=way.tree is not None, tree=way.tree) if padding else None
        try:
            with (
                nullcontext() if way.plain else self.fused.on(),
                packed(batch.lengths, batch.width, keep_packed=self.keeps_packed, read=read)
                if packed
                else nullcontext(),
            ):
                if batch.targets is None:
                    with self._last_states() as seen:
                        output = self._values_read(model(**self.inputs(batch)), batch, alone=read is not None)
                    more = [of_tokens(x, batch) for x in seen if read is None and x.dim() > 2]
                    return replace(output, others=[*output.others, *more])
                if way.plain:
                    return self._plain(model, batch)
                if self.head is None:
                    logits = model(**self.inputs(batch), use_cache=False).logits
                    return self._of_writer(logits, self.rows(logits, batch, None), batch, alone=read is not None)
                states, rows = self.states(self.head, model, batch)
                return self._of_writer(states, rows, batch, alone=read is not None)
        finally:
            self._default = before

    @contextmanager
    def _last_states(self) -> Iterator[list[Tensor]]:
        """Within the block the last layer's states are appended to the list: a head that reads some tokens hides a
        wrong one."""
        seen: list[Tensor] = []

        def note(layer: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            found = output[0] if isinstance(output, tuple) else output
            seen.append(found.clone())  # what follows may write into it

        handle = self.padding.layers[-1].register_forward_hook(note) if self.padding else None
        try:
            yield seen
        finally:
            if handle is not None:
                handle.remove()

    def _values_read(self, output: ModelOutput, batch: Batch, *, alone: bool) -> Output:
        """What the loss of a model that does not write reads.

        Args:
            alone: The last layer has computed only what is read.
        """
        found = [
            of_tokens(x, batch) if x.dim() > 2 or name in ENDS else x
            for name, x in output.items()
            if isinstance(x, Tensor) and x.is_floating_point()
        ]
        if self.task.step_loss is None:
            return Output(found)
        return Output([self.task.step_loss.values(output, batch)], () if alone else found)

    def _plain(self, model: nn.Module, batch: Batch) -> Output:
        """The logits of a model that writes, and, if the loss does without them, the states that they are made of."""
        body = backbone(self.base)
        handle = body.register_forward_hook(self._keep) if self.head and body is not self.base else None
        try:
            with self.head.watched() if self.head else nullcontext([]) as seen:
                logits = model(**self.inputs(batch), use_cache=False).logits
        finally:
            if handle is not None:
                handle.remove()
        states = logits if self.head is None else seen[0]
        return replace(self._of_writer(states, self.rows(states, batch, None), batch, alone=False), logits=logits)

    def _keep(self, body: nn.Module, args: object, output: object) -> None:
        self._made = output

    def _of_writer(self, states: Tensor, rows: Tensor, batch: Batch, *, alone: bool) -> Output:
        """The labelled tokens' states, or their logits; and, unless the last layer has computed these alone, those of
        all tokens, for a wrong token may be one without a label."""
        values = [states.flatten(0, -2)[rows]]
        if alone or self.task.has_encoder:
            return Output(values)
        return Output(values, [self._by_token(states, batch)])

    def _by_token(self, states: Tensor, batch: Batch) -> Tensor:
        """The tokens of each sequence without virtual ones, from packed or padded states."""
        layout = self.padding.layout if self.padding and self.keeps_packed else None
        if layout is None or is_fake(states):
            return of_tokens(states, batch)
        parts = zip(layout.by_sequence(states), batch.lengths, strict=True)
        return torch.cat([part[len(part) - n :] for part, n in parts])

    def rows(self, states: Tensor, batch: Batch, layout: Layout | None) -> Tensor:
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

    @property
    def keeps_packed(self) -> bool:
        """Whether the output layer gets packed states."""
        return self.padding is not None and self.padding.head_takes_packed and self.head is not None

    # ---- what the model allows ----

    def compare_logits(self, trial: ModelTrial) -> None:
        """Compares the loss with that of the model's own logits.

        Raises:
            ModelError: The model reads ahead.
        """
        head, logits, reason = self.head, None, None
        try:
            plain = trial.of(PLAIN).output
            logits = plain.logits
            if head is not None and logits is not None and trial.batch.targets is not None:
                own = logits.flatten(0, 1)[self.rows(logits, trial.batch, None)]
                reason = head.why_not(plain.values[0], own, trial.batch.targets[0]) or self._why_other(head, trial)
        except Exception as error:  # a model may raise any exception in a trial
            reason = trial_error(error, WITHOUT_LOGITS)
        self._made = None
        if self.task.decoder_only and not (logits is not None and reads_back(trial, logits)):
            check_causal(trial, self._trial)
        if reason is not None and head is not None:
            self._take_all_logits(trial, reason)

    def _why_other(self, head: HeadLoss, trial: ModelTrial) -> str | None:
        """Why the model's logits are not those of the loss, where they are large; None if they are."""
        body, made = backbone(self.base), self._made
        again = [(body, lambda *args, **kwargs: made)] if body is not self.base and made is not None else []
        with torch.no_grad(), patched(again), head.amplified() as given:
            logits = self.base(**self.inputs(trial.batch), use_cache=False).logits
        return head.why_other(given[0], logits)

    def _take_all_logits(self, trial: ModelTrial, reason: str) -> None:
        self.head, self.why_all_logits = None, reason
        trial.forget()

    def skip_logits(self, trial: ModelTrial) -> bool:
        """Whether the padded model can run without its logits."""
        try:
            trial.output(PADDED)
        except Exception as error:  # a model may raise any exception without its logits
            self._take_all_logits(trial, trial_error(error, WITHOUT_LOGITS))
            return False
        return True

    def find_packing(self, trial: ModelTrial) -> str | None:
        """Prepares the model to run without padding. Returns why that is off, or None."""
        try:
            self.padding = padding = PaddingFree(self.base)
        except NotPackableError as error:
            return message_of(error)
        padding.readers += active_rows(self.peft.injection) if self.peft else []
        trial.last = padding.layers[-1]
        if mixed := mixing(trial.model):
            reason = Bilingual(
                f"{mixed[0]} takes a mean over the whole padded batch", f"{mixed[0]} 对整个填充后的批次取平均"
            )
        else:
            reason = self._compare_packed(trial, padding) or padding.why_windows_are_lost()
            padding.is_tried = True
        if reason is not None:
            padding.close()
            self.padding = None
        return reason

    def _compare_packed(self, trial: ModelTrial, padding: PaddingFree) -> str | None:
        reason = None
        for padding.head_takes_packed in (True, False) if self.head else (False,):
            try:
                reason = trial.differs(PACKED, PLAIN, PACKED_ROWS, PADDED_ROWS)
            except Exception as error:  # a model may raise any exception on packed rows
                reason = trial_error(error, Bilingual("packed rows", "运行打包的样本"))
            if reason is None:
                return None
        if self.head and trial.comparing and not self.skip_logits(trial):
            return self._compare_packed(trial, padding)
        return reason
