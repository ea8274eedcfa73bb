"""VeRA's update of a linear layer's output, which saves no more for the backward pass than the inner vector of a token.

    y = b * B (d * A x)        A and B frozen

B's gradient is never formed: that of b is the diagonal of dy^T (d * A x) B^T, in O R numbers where y would take T O.

Shapes: x (T, I) with any leading dimensions, A (R, I), B (O, R), d (R,), b (O,).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from siliang.ops.context import Context


def vera_linear(x_TI: Tensor, A_RI: Tensor, B_OR: Tensor, d_R: Tensor, b_O: Tensor) -> Tensor:
    """b * B (d * A x), (T, O), in the dtype of x, or of autocast where it is on. The others are cast to it."""
    if torch.is_autocast_enabled(x_TI.device.type):
        x_TI = x_TI.to(torch.get_autocast_dtype(x_TI.device.type))
    with torch.autocast(x_TI.device.type, enabled=False):
        return cast(Tensor, _VeraLinear.apply(x_TI, A_RI, B_OR, d_R, b_O))


class _VeraLinear(torch.autograd.Function):
    """A and B are cast again for the backward pass: they are one tensor for all layers, and the casts one a layer."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
        Ax = x @ A.to(x.dtype).T
        ctx.save_for_backward(Ax, A, B, d, b)
        return (Ax * d.to(x.dtype)) @ B.to(x.dtype).T * b.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Context, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        Ax, A, B, d, b = ctx.saved_tensors
        dtype = dy.dtype
        with torch.autocast(dy.device.type, enabled=False):
            inner = (dy * b.to(dtype)) @ B.to(dtype)
            dx = (inner * d.to(dtype)) @ A.to(dtype) if ctx.needs_input_grad[0] else None
            dd = (inner * Ax).flatten(0, -2).sum(0, dtype=d.dtype)
            outer = dy.flatten(0, -2).T @ (Ax * d.to(dtype)).flatten(0, -2)
            db = (outer.to(b.dtype) * B.to(b.dtype)).sum(1)
        return dx, None, None, dd, db
