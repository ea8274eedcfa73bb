"""Virtual tokens before the embeddings of the text: P ; E(x). Prompt tuning and P-tuning.

Positions count on from the virtual tokens, as in PEFT.

Shapes: B batch, N tokens, V virtual tokens, D hidden size; P (V, D), or (B, V, D).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siliang.methods.prompt_hooks import Arguments, PromptHooks, prompted_embeddings, tensor_in
from siliang.models.introspect import backbone, cached_tokens, encoder, is_encoder_decoder
from siliang.types import TaskType

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutput


class EmbeddingHooks(PromptHooks):
    """P ; E(x)."""

    def _add(self) -> None:
        model, task = self.model, self.config.task_type
        self._embeddings = prompted_embeddings(model)
        self._cut = False
        if is_encoder_decoder(model):
            # generate() runs the encoder alone, so the prompt is added there; the cross-attention's mask is padded too
            self.before(encoder(model), self._prepend)
            self.before(model, self._pad_mask)
        elif task in (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS) or (
            task is TaskType.SEQ_CLS and hasattr(model, "score")
        ):
            # the head must see the text's tokens alone: it has an output for each, or reads the last that is no padding
            self.before(backbone(model), self._prepend)
            self.after(backbone(model), self._cut_off)
        else:
            self.before(model, self._prepend)

    def _prepend(self, module: nn.Module, named: Arguments) -> None:
        ids, embeds, V = tensor_in(named, "input_ids"), tensor_in(named, "inputs_embeds"), self.V
        given = ids if ids is not None else embeds
        if given is None:
            return
        B, N = given.shape[:2]
        seen = cached_tokens(named)
        mask = named.get("attention_mask")
        # after the first token of a generation the cache holds the virtual tokens already
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == (seen + N - V if seen else N):
            named["attention_mask"] = F.pad(mask, (V, 0), value=1)
        positions = tensor_in(named, "position_ids")
        if positions is not None:
            positions = positions + V
        self._cut = not seen
        if not seen:
            if embeds is None:
                embeds = self._embeddings(ids)
            P = self.prompt.of_rows(B)[:, :V].to(device=embeds.device, dtype=embeds.dtype)
            named["input_ids"], named["inputs_embeds"] = None, torch.cat([P, embeds], 1)
            if (types := tensor_in(named, "token_type_ids")) is not None:
                named["token_type_ids"] = F.pad(types, (V, 0))
            labels = tensor_in(named, "labels")
            if labels is not None and self.config.task_type is TaskType.CAUSAL_LM:
                named["labels"] = F.pad(labels, (V, 0), value=-100)
            if positions is not None:
                first = torch.arange(V, device=positions.device).expand(len(positions), -1)
                positions = torch.cat([first, positions], 1)
        if positions is not None:
            named["position_ids"] = positions

    def _pad_mask(self, module: nn.Module, named: Arguments) -> None:
        if (mask := tensor_in(named, "attention_mask")) is not None:
            named["attention_mask"] = F.pad(mask, (self.V, 0), value=1)

    def _cut_off(
        self, module: nn.Module, args: tuple[object, ...], output: BaseModelOutput | tuple[Tensor, ...]
    ) -> object:
        if not self._cut:
            return output
        if isinstance(output, tuple):
            return (output[0][:, self.V :], *output[1:])
        assert output.last_hidden_state is not None
        output.last_hidden_state = output.last_hidden_state[:, self.V :]
        return output
