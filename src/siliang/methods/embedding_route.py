"""Virtual tokens in front of the embeddings of the text: P ; E(x). Prompt tuning and P-tuning.

Positions count on from the virtual tokens, as in PEFT.

Shapes: B batch, N tokens, V virtual tokens, D hidden size; P (V, D).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from siliang.methods.route import Route, prompted_embeddings
from siliang.models.introspect import backbone, cached_tokens, is_encoder_decoder
from siliang.types import TaskType


class EmbeddingRoute(Route):
    """P ; E(x)."""

    def _install(self) -> None:
        model, task = self.model, self.config.task_type
        self._embeddings: Any = prompted_embeddings(model)
        self._cut = False
        if is_encoder_decoder(model):
            # generate() runs the encoder by itself, so the prompt joins there; the cross-attention's mask grows too
            self.before(model.get_encoder(), self._prepend)  # type: ignore[operator]
            self.before(model, self._grow_mask)
        elif task in (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS) or (
            task is TaskType.SEQ_CLS and hasattr(model, "score")
        ):
            # the head must see the user's own tokens: one answer for each, or that of the last one that is no padding
            self.before(backbone(model), self._prepend)
            self.after(backbone(model), self._cut_off)
        else:
            self.before(model, self._prepend)

    def _prepend(self, module: nn.Module, named: dict[str, Any]) -> None:
        ids, embeds, V = named.get("input_ids"), named.get("inputs_embeds"), self.V
        given = ids if ids is not None else embeds
        if given is None:
            return
        B, N = given.shape[:2]
        seen = cached_tokens(named)
        mask = named.get("attention_mask")
        # in a generation that has begun, the cache holds the virtual tokens already
        if mask is not None and mask.dim() == 2 and mask.shape[1] == (seen + N - V if seen else N):
            named["attention_mask"] = F.pad(mask, (V, 0), value=1)
        positions = named.get("position_ids")
        if positions is not None:
            positions = positions + V
        self._cut = not seen
        if not seen:
            embeds = self._embeddings(ids) if embeds is None else embeds
            P = self.prompt()[:V].to(device=embeds.device, dtype=embeds.dtype)
            named["input_ids"], named["inputs_embeds"] = None, torch.cat([P.expand(B, -1, -1), embeds], 1)
            if named.get("token_type_ids") is not None:
                named["token_type_ids"] = F.pad(named["token_type_ids"], (V, 0))
            if named.get("labels") is not None and self.config.task_type is TaskType.CAUSAL_LM:
                named["labels"] = F.pad(named["labels"], (V, 0), value=-100)
            if positions is not None:
                first = torch.arange(V, device=positions.device).expand(len(positions), -1)
                positions = torch.cat([first, positions], 1)
        if positions is not None:
            named["position_ids"] = positions

    def _grow_mask(self, module: nn.Module, named: dict[str, Any]) -> None:
        if named.get("attention_mask") is not None:
            named["attention_mask"] = F.pad(named["attention_mask"], (self.V, 0), value=1)

    def _cut_off(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self._cut:
            return output
        if isinstance(output, tuple):
            return (output[0][:, self.V :], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, self.V :]
        return output
