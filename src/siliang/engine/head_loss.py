"""The loss of a language model's output layer, without the logits of all tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from siliang.engine.patches import patched
from siliang.language import Bilingual
from siliang.ops.layout import repeat_rows
from siliang.ops.masked_ce import head_logits, masked_cross_entropy, scaled_and_capped

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma's, RecurrentGemma's, xLSTM's
CHANGED = Bilingual("its logits are changed after the output layer", "它的 logits 在输出层之后又有改动")
AMPLIFIED = 100.0  # the largest logit that a trial gives a model to change


class HeadLoss:
    """The loss of a language model's output layer, computed without all logits.

    The model's forward skips the output layer, which returns one column instead of its logits. `loss` gets the input of
    the output layer.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Module) -> None:
        """
        Args:
            head: The model's output layer.
        """
        config = model.config.get_text_config()
        self._head = head
        self._softcap: float | None = next((c for name in SOFTCAPS if (c := getattr(config, name, None))), None)
        scaling = getattr(config, "logits_scaling", None)  # Granite divides by it
        self._scale = 1.0 / scaling if scaling else float(getattr(config, "logit_scale", None) or 1.0)

    @contextmanager
    def skipped(self) -> Iterator[list[Tensor]]:
        """Within the block, the output layer appends its input to the list, and computes nothing."""
        seen: list[Tensor] = []

        def skip(states: Tensor) -> Tensor:
            seen.append(states)
            return states[..., :1].clone()  # FSDP2 allows no view of a sharded module's output

        with patched([(self._head, skip)]):
            yield seen

    @contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """Within the block, the output layer appends its input to the list."""
        seen: list[Tensor] = []

        def note(head: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.extend(args)

        handle = self._head.register_forward_pre_hook(note)
        try:
            yield seen
        finally:
            handle.remove()

    def loss(self, states: Tensor, rows: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The loss, summed over the labelled rows.

        Args:
            states: The input of the output layer, (..., D).
            rows: (N,), into the flattened states; several labels may be of one.
            labels: (N,).
        """
        hidden_ND = repeat_rows(states.flatten(0, -2), rows)
        return masked_cross_entropy(
            hidden_ND,
            self._head,
            labels,
            softcap=self._softcap,
            scale=self._scale,
            label_smoothing=label_smoothing,
        )

    def logits(self, states: Tensor, rows: Tensor) -> Tensor:
        """The logits of the labelled rows, (N, V), in fp32."""
        hidden_ND = repeat_rows(states.flatten(0, -2), rows)
        return head_logits(hidden_ND, self._head, softcap=self._softcap, scale=self._scale)

    @contextmanager
    def amplified(self) -> Iterator[list[Tensor]]:
        """Within the block, the output layer's logits are multiplied, so that the largest is `AMPLIFIED`. They are
        appended to the list."""
        seen: list[Tensor] = []

        def amplify(head: nn.Module, args: object, logits: Tensor) -> Tensor:
            seen.append(logits * (AMPLIFIED / logits.abs().max().clamp(min=1e-6)))
            return seen[-1].clone()  # a model may change it in place

        handle = self._head.register_forward_hook(amplify)
        try:
            yield seen
        finally:
            handle.remove()

    @torch.no_grad()
    def why_other(self, given: Tensor, logits: Tensor) -> str | None:
        """Why the loss is not that of the model's logits, by what the model makes of large ones; None if it is.

        A trained model's logits are large. What it does to them may hardly show in those of a trial (a softcap does
        nothing near 0), or only in a loss of less than a format's digits.

        Args:
            given: The output layer's logits, as the model got them.
            logits: The model's.
        """
        expected = scaled_and_capped(given, softcap=self._softcap, scale=self._scale)
        limit = 1e-4 if given.dtype == torch.float32 else 2e-2
        if logits.shape == expected.shape and bool((logits - expected).abs().max() <= limit * expected.abs().max()):
            return None
        return CHANGED

    @torch.no_grad()
    def why_not(self, states: Tensor, logits: Tensor, labels: Tensor) -> str | None:
        """Why the loss of these states is not that of the model's own logits; None if it is.

        Args:
            states: Of the labelled rows, (N, D).
            logits: (N, V).
        """
        expected = F.cross_entropy(logits.float(), labels, reduction="sum")
        found = self.loss(states, torch.arange(len(states), device=states.device), labels)
        off = float((found - expected).abs() / expected.abs().clamp(min=1e-6))
        if off < (1e-4 if states.dtype == torch.float32 else 2e-2):
            return None
        return CHANGED
