"""A parameter whose gradient is projected: on some directions, or on all others.

    U = U        dU <- B B^T dU,  or dU - B B^T dU

Shapes: U (O, R), B (O, K) with orthonormal columns.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from siliang.ops.context import ProjectedContext


def inside_of(B_OK: Tensor, U_OR: Tensor) -> Tensor:
    """U as it is. Its gradient keeps what lies in the span of B."""
    return cast(Tensor, _Projected.apply(U_OR, B_OK, False))


def outside_of(B_OK: Tensor, U_OR: Tensor) -> Tensor:
    """U as it is. Its gradient loses what lies in the span of B."""
    return cast(Tensor, _Projected.apply(U_OR, B_OK, True))


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: ProjectedContext, U: Tensor, B: Tensor, outside: bool) -> Tensor:
        ctx.save_for_backward(B)
        ctx.outside = outside
        return U.view_as(U)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: ProjectedContext, dU: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (B,) = ctx.saved_tensors
        inside = B @ (B.T @ dU)
        return dU - inside if ctx.outside else inside, None, None
