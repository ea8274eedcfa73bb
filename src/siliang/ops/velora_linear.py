"""LoRA's update of a linear layer that saves a few numbers a token for the backward pass, in place of its input.

    y' = y + s (m * x) A^T B^T        dA of x^ in place of m * x: each of G groups of a token's features is (x_g . v) v

Saved are x_g . v, (T, G), A x^T, and one byte for each element of a mask. The gradients of x and B are exact.

Shapes: T tokens (any leading dimensions), I features in, O features out, R rank, G groups of D = ceil(I / G) features,
v (D,) of length 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from siliang.ops.context import CompressedContext


def grouped(x_TI: Tensor, groups: int) -> Tensor:
    """The groups of features of each token, (T, G, D); zeros fill the last one."""
    D = -(-x_TI.shape[-1] // groups)
    return F.pad(x_TI, (0, groups * D - x_TI.shape[-1])).reshape(-1, groups, D)


def compressed_projection(x_TI: Tensor, A_RI: Tensor, v_D: Tensor, groups: int, scale: float) -> Tensor:
    """x A^T, (..., R), whose gradient of A is that of x compressed along v.

    Args:
        scale: What the compressed x is multiplied by.
    """
    return _Projection.apply(x_TI, A_RI, v_D, groups, scale)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: CompressedContext, x_TI: Tensor, A_RI: Tensor, v_D: Tensor, groups: int, scale: float) -> Tensor:
        v = v_D.to(x_TI.dtype)
        ctx.save_for_backward(grouped(x_TI, groups) @ v, A_RI, v)
        ctx.s, ctx.shape = scale, x_TI.shape
        return F.linear(x_TI, A_RI.to(x_TI.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: CompressedContext, d_TR: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        compressed_TG, A_RI, v_D = ctx.saved_tensors
        dx = dA = None
        d = d_TR.reshape(-1, d_TR.shape[-1])
        if ctx.needs_input_grad[0]:
            dx = (d @ A_RI.to(d.dtype)).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            # (R, G) of each token's numbers, then along v: R x G x D numbers, and none for each token
            dA_RGD = (d.T @ compressed_TG.to(d.dtype))[..., None] * (ctx.s * v_D.to(d.dtype))
            dA = dA_RGD.flatten(1)[:, : A_RI.shape[1]].to(A_RI.dtype)
        return dx, dA, None, None, None
