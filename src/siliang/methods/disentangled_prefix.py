"""A prefix before DeBERTa's attention, which asks no cache for its keys and values.

Virtual rows are put in front of its hidden states, their keys and values are replaced by the prefix, and their outputs
are cut off.

Shapes: B batch, N tokens, V virtual tokens, D hidden size, H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siliang.methods.route import Route
from siliang.models.introspect import relative_positions


class DisentangledPrefix:
    """The hooks on one attention.

    Args:
        route: Of the prefix; it takes the hooks off.
        attention: The module.
        layer: Its number.
        prefix: Of a layer's number, its keys and values, (2, H, V, K).
    """

    def __init__(self, route: Route, attention: Any, layer: int, prefix: Callable[[int], Tensor]) -> None:
        self.V, self._attention, self._layer, self._prefix = route.V, attention, layer, prefix
        route.before(attention, self._widen)
        route.after(attention, self._narrow)
        if hasattr(attention, "in_proj"):
            route.after(attention.in_proj, self._put_fused)
        else:
            route.after(attention.key_proj, partial(self._put, which=0))
            route.after(attention.value_proj, partial(self._put, which=1))

    def _widen(self, module: nn.Module, named: dict[str, Any]) -> None:
        V, hidden_BND = self.V, named["hidden_states"]
        named["hidden_states"] = F.pad(hidden_BND, (0, 0, V, 0))
        self._widened = named["hidden_states"].shape[:2]
        if named.get("query_states") is not None:
            named["query_states"] = F.pad(named["query_states"], (0, 0, V, 0))
        # (B, 1, N, N): the virtual rows may look at anything, for their output is cut off
        named["attention_mask"] = F.pad(named["attention_mask"], (V, 0, V, 0), value=1)
        if named.get("relative_pos") is not None:
            named["relative_pos"] = relative_positions(module, named["hidden_states"])

    def _narrow(self, module: nn.Module, args: Any, out: Any) -> Any:
        return (out[0][:, self.V :], *out[1:])

    def _put(self, module: nn.Module, args: Any, out_BND: Tensor, *, which: int) -> Tensor:
        """The prefix in the place of the virtual rows of a key or value projection."""
        if out_BND.shape[:2] != self._widened:  # DeBERTa sends its table of relative positions through here as well
            return out_BND
        P_VD = self._prefix(self._layer)[which].transpose(0, 1).flatten(1).to(out_BND.dtype)
        return torch.cat([P_VD.expand(len(out_BND), -1, -1), out_BND[:, self.V :]], 1)

    def _put_fused(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        """The same for DeBERTa v1's one projection: for each head query, key and value in turn."""
        heads = self._attention.num_attention_heads
        k_HVK, v_HVK = self._prefix(self._layer).to(out.dtype)
        rows = out[:, : self.V].unflatten(-1, (heads, 3, -1))
        k, v = (t.transpose(0, 1).expand(len(out), -1, -1, -1) for t in (k_HVK, v_HVK))
        rows = torch.stack([rows[..., 0, :], k, v], -2).flatten(-3)
        return torch.cat([rows, out[:, self.V :]], 1)
