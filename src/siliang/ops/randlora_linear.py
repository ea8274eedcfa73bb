"""RandLoRA's update of a linear layer's output, which keeps nothing of the size of a weight for the backward pass.

    y = P x, or P^T x where the layer has fewer outputs than inputs        P = B S,  S_kn = lambda_kn A_k * gamma_n

Shapes: B (L, N R) frozen, A (R, M) frozen, lambda (R, N), gamma (N, M), S (R N, M), P (L, M); L the larger of the
layer's inputs and outputs, M the smaller, x (T, M) or, for P^T, (T, L).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from siliang.ops.context import TransposedContext


def scaled_bases(A_RM: Tensor, lambda_RN: Tensor, gamma_NM: Tensor) -> Tensor:
    """S, (R N, M)."""
    return (lambda_RN[..., None] * A_RM[:, None] * gamma_NM).flatten(0, 1)


def randlora_linear(
    x: Tensor, B_LK: Tensor, A_RM: Tensor, lambda_RN: Tensor, gamma_NM: Tensor, *, transposed: bool
) -> Tensor:
    """P x, (T, L), or P^T x, (T, M), in the dtype of x, or of autocast where it is on. The others are cast to it."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return cast(Tensor, _RandLora.apply(x, B_LK, A_RM, lambda_RN, gamma_NM, transposed))


class _RandLora(torch.autograd.Function):
    """Saved is what S is multiplied with: S itself, and the casts of B, are made again."""

    @staticmethod
    def forward(
        ctx: TransposedContext, x: Tensor, B: Tensor, A: Tensor, scales: Tensor, gamma: Tensor, transposed: bool
    ) -> Tensor:
        S, B_cast = scaled_bases(A.to(scales.dtype), scales, gamma).to(x.dtype), B.to(x.dtype)
        inner = x @ B_cast if transposed else x
        ctx.save_for_backward(inner, B, A, scales, gamma)
        ctx.transposed = transposed
        return inner @ S if transposed else (inner @ S.T) @ B_cast.T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: TransposedContext, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inner, B, A, scales, gamma = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            A_wide, B_cast = A.to(scales.dtype), B.to(dy.dtype)
            outer = dy if ctx.transposed else dy @ B_cast
            left, right = (inner, outer) if ctx.transposed else (outer, inner)
            dS = left.flatten(0, -2).T @ right.flatten(0, -2)
            dS_RNM = dS.to(scales.dtype).view(*scales.shape, -1) * A_wide[:, None]
            dscales = torch.einsum("rnm,nm->rn", dS_RNM, gamma)
            dgamma = torch.einsum("rnm,rn->nm", dS_RNM, scales)
            dx = None
            if ctx.needs_input_grad[0]:
                S = scaled_bases(A_wide, scales, gamma).to(dy.dtype)
                dx = (dy @ S.T) @ B_cast.T if ctx.transposed else outer @ S
        return dx, None, None, dscales, dgamma, None
