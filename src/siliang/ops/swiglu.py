"""The gated unit of Llama's feed-forward layers. It keeps two tensors for the backward pass; autograd keeps three.

    y = silu(g) u,   silu(g) = g sigmoid(g)
    du = dy silu(g),   dg = dy u silu'(g)

silu(g) is computed again: that is cheaper than to write it to memory and to read it.

Shapes: g, u, y (..., F), F features of the feed-forward layer.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from siliang.ops.context import Context


def swiglu(g: Tensor, u: Tensor, *, impl: Literal["fused", "reference"] = "fused") -> Tensor:
    """silu(g) u, with the same roundings as by the plain expression.

    Args:
        impl: reference is the plain expression. fused cannot be differentiated twice.
    """
    if impl == "reference" or g.dtype != u.dtype:
        return F.silu(g) * u
    y: Tensor = _SwiGlu.apply(g, u)
    return y


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        return F.silu(g).mul_(u)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Context, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        g, u = ctx.saved_tensors
        dg = du = None
        if ctx.needs_input_grad[1]:
            du = F.silu(g).mul_(dy)
        if ctx.needs_input_grad[0]:
            dg = torch.ops.aten.silu_backward(dy * u, g)
        return dg, du
