"""The root-mean-square norm, in fewer passes over memory than autograd needs for it.

    y = w x r,   r = (mean(x^2) + eps)^(-1/2)
    dx = r (g - x r^2 mean(g x)),   dw = sum_T dy x r        g = w dy

Kept for the backward pass are x, which the residual stream keeps anyway, and r. Computed in fp32, whatever x is.

Shapes: T tokens (any leading dimensions), D features.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from siliang.ops.context import Context


def rms_norm(x_TD: Tensor, w_D: Tensor, eps: float, *, impl: Literal["fused", "reference"] = "fused") -> Tensor:
    """As transformers' RMS norms compute it: the normed x is rounded to its own format before it is scaled.

    Args:
        impl: reference is the plain expression. fused cannot be differentiated twice.

    Returns:
        (..., D), in the format that x and w have in common.
    """
    if impl == "reference":
        x = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))  # fp64 stays fp64, for the tests' reference
        return w_D * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(x_TD.dtype)
    if x_TD.device.type == "cuda" and x_TD.dtype == w_D.dtype:
        return F.rms_norm(x_TD, w_D.shape, w_D, eps)  # one kernel in place of eight, which keeps the same; rounds once
    return _RmsNorm.apply(x_TD, w_D, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
        x = x_TD.float()
        r_T1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, w_D, r_T1)
        return (x * r_T1).to(x_TD.dtype) * w_D

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Context, dy_TD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_TD, w_D, r_T1 = ctx.saved_tensors
        x = x_TD.float()
        dx = dw = None
        if ctx.needs_input_grad[1]:
            dw = (dy_TD * (x * r_T1)).flatten(0, -2).sum(0).to(w_D.dtype)
        if ctx.needs_input_grad[0]:
            g = (dy_TD * w_D).float()
            mean_T1 = torch.linalg.vecdot(g, x).unsqueeze(-1).div_(x.shape[-1])
            dx = g.mul_(r_T1).addcmul_(x, r_T1.pow(3).mul_(mean_T1), value=-1).to(x_TD.dtype)
        return dx, dw, None
