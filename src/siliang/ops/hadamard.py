"""The elementwise product of two low-rank matrices, which saves no more than their factors for the backward pass.

    D = s (A1 B1 * A2 B2)

Shapes: D (O, I), A1, A2 (O, R), B1, B2 (R, I).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from siliang.ops.context import ScaledContext


def low_rank_hadamard(A1_OR: Tensor, B1_RI: Tensor, A2_OR: Tensor, B2_RI: Tensor, scaling: float) -> Tensor:
    """s (A1 B1 * A2 B2), (O, I)."""
    if A1_OR.device.type == "meta":
        return (A1_OR @ B1_RI) * (A2_OR @ B2_RI) * scaling
    return cast(Tensor, _Hadamard.apply(A1_OR, B1_RI, A2_OR, B2_RI, scaling))


class _Hadamard(torch.autograd.Function):
    """The two products are computed again for the gradient: each is as large as the layer's weight."""

    @staticmethod
    def forward(ctx: ScaledContext, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(A1, B1, A2, B2)
        ctx.s = s
        return (A1 @ B1).mul_(A2 @ B2).mul_(s)

    @staticmethod
    def backward(ctx: ScaledContext, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        A1, B1, A2, B2 = ctx.saved_tensors
        grad1 = (A2 @ B2).mul_(grad).mul_(ctx.s)
        grad_A1, grad_B1 = grad1 @ B1.T, A1.T @ grad1
        del grad1
        grad2 = (A1 @ B1).mul_(grad).mul_(ctx.s)
        return grad_A1, grad_B1, grad2 @ B2.T, A2.T @ grad2, None
