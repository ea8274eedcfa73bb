"""A product with a weight that is computed from few parameters, and computed again in the backward pass.

    y = x W^T        W = f(parameters)

Saved is x alone: neither W nor what f forms on the way, each as large as the layer's weight.

Shapes: x (T, I) with any leading dimensions, W (O, I), y (T, O).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from siliang.ops.context import RecomputedContext


def recomputed_linear(x_TI: Tensor, weight: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """x W^T, (T, O), in the dtype of x, or of autocast where it is on; W is cast to it.

    Args:
        weight: Gives W, the same each time. It reads the parameters where they are.
        parameters: What W is a function of, as far as it is trained.
    """
    device = x_TI.device.type
    if device == "meta":
        return F.linear(x_TI, weight().to(x_TI.dtype))
    if torch.is_autocast_enabled(device):
        x_TI = x_TI.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return cast(Tensor, _Recomputed.apply(x_TI, weight, *parameters))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: RecomputedContext, x: Tensor, weight: Callable[[], Tensor], *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.parameters = weight, parameters
        return F.linear(x, weight().to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: RecomputedContext, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad
        with torch.autocast(dy.device.type, enabled=False):
            with torch.enable_grad():
                W = ctx.weight()
            dx = dy @ W.detach().to(dy.dtype) if needs_x else None
            trained = [p for p, needed in zip(ctx.parameters, needs, strict=True) if needed]
            dW = dy.flatten(0, -2).T @ x.flatten(0, -2)
            found = iter(torch.autograd.grad(W, trained, dW.to(W.dtype)) if trained else ())
        return dx, None, *(next(found) if needed else None for needed in needs)
