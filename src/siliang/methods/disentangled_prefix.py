"""A prefix before DeBERTa's attention, which has no cache.

V rows are added before its hidden states, their keys and values are replaced by the prefix, and their outputs are
cut off.

Shapes: B batch, N tokens, V virtual tokens, D hidden size, H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siliang.methods.prompt_hooks import Arguments, PromptHooks, tensor_in
from siliang.models.introspect import relative_positions


class DisentangledPrefix:
    """The hooks on one attention.

    Args:
        hooks: Those of the prefix, to which these are added.
        attention: The module.
        layer: Its number.
        prefix: For the number of a layer, its keys and values, (2, H, V, K).
    """

    def __init__(self, hooks: PromptHooks, attention: nn.Module, layer: int, prefix: Callable[[int], Tensor]) -> None:
        self.V, self._attention, self._layer, self._prefix = hooks.V, attention, layer, prefix
        hooks.before(attention, self._pad_inputs)
        hooks.after(attention, self._cut_outputs)
        if hasattr(attention, "in_proj"):
            hooks.after(attention.get_submodule("in_proj"), self._insert_fused)
        else:
            hooks.after(attention.get_submodule("key_proj"), partial(self._insert, which=0))
            hooks.after(attention.get_submodule("value_proj"), partial(self._insert, which=1))

    def _pad_inputs(self, module: nn.Module, named: Arguments) -> None:
        V, hidden_BND, mask = self.V, tensor_in(named, "hidden_states"), tensor_in(named, "attention_mask")
        assert hidden_BND is not None and mask is not None
        padded_BND = F.pad(hidden_BND, (0, 0, V, 0))
        named["hidden_states"], self._padded = padded_BND, padded_BND.shape[:2]
        if (queries := tensor_in(named, "query_states")) is not None:
            named["query_states"] = F.pad(queries, (0, 0, V, 0))
        # (B, 1, N, N): the added rows may attend to all, for their output is cut off
        named["attention_mask"] = F.pad(mask, (V, 0, V, 0), value=1)
        if named.get("relative_pos") is not None:
            named["relative_pos"] = relative_positions(module, padded_BND)

    def _cut_outputs(self, module: nn.Module, args: tuple[object, ...], out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (out[0][:, self.V :], *out[1:])

    def _insert(self, module: nn.Module, args: tuple[object, ...], out_BND: Tensor, *, which: int) -> Tensor:
        """Replaces the added rows of a key or value projection by the prefix."""
        if out_BND.shape[:2] != self._padded:  # DeBERTa projects its table of relative positions here as well
            return out_BND
        P_VD = self._prefix(self._layer)[which].transpose(0, 1).flatten(1).to(out_BND.dtype)
        return torch.cat([P_VD.expand(len(out_BND), -1, -1), out_BND[:, self.V :]], 1)

    def _insert_fused(self, module: nn.Module, args: tuple[object, ...], out: Tensor) -> Tensor:
        """The same for DeBERTa v1's one projection: for each head query, key and value in turn."""
        heads = self._attention.num_attention_heads
        assert isinstance(heads, int)
        k_HVK, v_HVK = self._prefix(self._layer).to(out.dtype)
        rows = out[:, : self.V].unflatten(-1, (heads, 3, -1))
        k, v = (t.transpose(0, 1).expand(len(out), -1, -1, -1) for t in (k_HVK, v_HVK))
        rows = torch.stack([rows[..., 0, :], k, v], -2).flatten(-3)
        return torch.cat([rows, out[:, self.V :]], 1)
