"""What LoRA adds to a linear layer's output, in one step that saves few tensors for the backward pass.

    y' = y + s (m * x) A^T B^T + s b        m: dropout's mask, 1/(1-p) or 0

Saved are x (which q, k and v share when they read the same), A x^T, A and B in the format of the products, and one byte
for each element of a mask. The products of which one side is the rank are laid out for the device: see `_thin`.

Shapes: T tokens (any leading dimensions), I features in, O features out, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from siliang.ops.context import LoraContext
from siliang.ops.place import kind_of

Impl = Literal["fused", "reference", "peft"]
_impl: ContextVar[Impl] = ContextVar("lora_linear", default="fused")


def lora_linear(
    y_TO: Tensor,
    x_TI: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    scaling: float | Tensor,
    *,
    bias_O: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    impl: Impl | None = None,
) -> Tensor:
    """Adds the low-rank update of `x_TI` to the base layer's output `y_TO`.

    A and B may be wider than x (fp32 and bf16): they are cast down, which touches R * (I + O) numbers, rather
    than x up, which would copy every activation (PEFT issue 2421).

    Args:
        scaling: A tensor (of hot-swapping) is computed with by the reference.
        impl: reference is the plain expression, which autograd differentiates. fused cannot be differentiated twice.
            peft is what PEFT computes, which copies x to the format of A. None: that of `lora_linear_as`, or fused.

    Returns:
        (..., O), in the dtype of `y_TO`.
    """
    dropout_p = dropout_p if training else 0.0
    impl = impl or _impl.get()
    if impl == "peft":
        x_TI = F.dropout(x_TI.to(A_RI.dtype), dropout_p) if dropout_p else x_TI.to(A_RI.dtype)
        return (y_TO + F.linear(F.linear(x_TI, A_RI), B_OR, bias_O) * scaling).to(y_TO.dtype)
    if impl == "reference" or y_TO.device.type == "meta" or isinstance(scaling, Tensor):
        x_TI = F.dropout(x_TI, dropout_p)
        bias_O = None if bias_O is None else bias_O.to(x_TI.dtype)
        update_TO = F.linear(F.linear(x_TI, A_RI.to(x_TI.dtype)), B_OR.to(x_TI.dtype), bias_O)
        return y_TO + (scaling * update_TO).to(y_TO.dtype)
    return _LoraLinear.apply(y_TO, x_TI, A_RI, B_OR, bias_O, scaling, dropout_p)


@contextmanager
def lora_linear_as(impl: Impl) -> Iterator[None]:
    """Within the block LoRA is computed with `impl` in this thread."""
    token = _impl.set(impl)
    try:
        yield
    finally:
        _impl.reset(token)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: LoraContext,
        y_TO: Tensor,
        x_TI: Tensor,
        A_RI: Tensor,
        B_OR: Tensor,
        bias_O: Tensor | None,
        s: float,
        dropout_p: float,
    ) -> Tensor:
        dtype = y_TO.dtype  # the base layer has computed in it, under autocast as well
        mask_TI = None
        x = x_TI.reshape(-1, x_TI.shape[-1])
        with torch.autocast(y_TO.device.type, enabled=False):
            if dropout_p:
                mask_TI = torch.rand_like(x, dtype=torch.float32) >= dropout_p
            A, B = A_RI.to(dtype), B_OR.to(dtype)
            Ax_RT = _thin(A, _masked(x.to(dtype), mask_TI, dropout_p))
            y, B_RO = y_TO.reshape(-1, y_TO.shape[-1]), B.T
            # no view of another tensor: some models change a layer's output in place
            sum_TO = torch.empty(y_TO.shape, dtype=dtype, device=y_TO.device)
            out = sum_TO.view(y.shape)
            if bias_O is None:
                torch.addmm(y, Ax_RT.T, B_RO, alpha=s, out=out)
            else:
                torch.add(y, torch.addmm(bias_O.to(dtype), Ax_RT.T, B_RO), alpha=s, out=out)
        ctx.save_for_backward(x_TI, Ax_RT, mask_TI, A, B)
        ctx.s, ctx.p, ctx.bias = s, dropout_p, None if bias_O is None else bias_O.dtype
        ctx.factors = A_RI.dtype, B_OR.dtype
        return sum_TO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: LoraContext, dy_TO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_TI, Ax_RT, mask_TI, A_RI, B_OR = ctx.saved_tensors
        s, dtype, needs = ctx.s, dy_TO.dtype, ctx.needs_input_grad
        dx = dA = dB = db = None
        with torch.autocast(dy_TO.device.type, enabled=False):
            dy, x = dy_TO.reshape(-1, dy_TO.shape[-1]), x_TI.reshape(-1, x_TI.shape[-1])
            Bdy_RT = _thin(B_OR.T, dy).mul_(s)
            if needs[1]:
                dx = _masked(Bdy_RT.T @ A_RI, mask_TI, ctx.p).to(x_TI.dtype).view_as(x_TI)
            if needs[2]:
                dA = _product(Bdy_RT, _masked(x.to(dtype), mask_TI, ctx.p), ctx.factors[0])
            if needs[3]:
                dB = _thin_gradient(Ax_RT, dy, ctx.factors[1]).mul_(s)
            if needs[4]:
                db = (s * dy.sum(0, dtype=torch.float32)).to(ctx.bias)
        return dy_TO, dx, dA, dB, db, None, None


def _thin(A_RI: Tensor, x_TI: Tensor) -> Tensor:
    """A x^T, (R, T). On a CPU it has R rows in memory, where that is up to twice as fast as so few columns; elsewhere T
    rows, because those of T elements would begin at odd addresses, which the fast kernels of CUDA refuse."""
    return A_RI @ x_TI.T if kind_of(x_TI) == "cpu" else (x_TI @ A_RI.T).T


def _thin_gradient(Ax_RT: Tensor, dy_TO: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T (A x^T)^T, (O, R), each factor as `_thin` has laid it out."""
    return (Ax_RT @ dy_TO).T.to(dtype) if kind_of(dy_TO) == "cpu" else _product(dy_TO.T, Ax_RT.T, dtype)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in this format. CUDA's products of half precision add up in fp32, and can be had before they are rounded."""
    half = a.dtype in (torch.bfloat16, torch.float16)
    if a.device.type == "cuda" and torch.version.hip is None and half and dtype is torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def _masked(x_TI: Tensor, mask_TI: Tensor | None, dropout_p: float) -> Tensor:
    if mask_TI is None:
        return x_TI
    return x_TI * mask_TI / (1.0 - dropout_p) if dropout_p < 1.0 else torch.zeros_like(x_TI)
