"""Attention of sequences that are padded to one length, and the ways to compute it.

Shapes: S sequences, H query heads, G key and value heads, n tokens, K head size.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from siliang.capabilities import why_missing
from siliang.ops.place import kind_of

VARLEN = "flash attention of packed rows on CUDA"  # a row of CAPABILITIES
# Those of CUDA but cuDNN's: it plans anew for each shape, which takes 2 ms, and the shapes of buckets seldom return.
SDPA_ON_CUDA = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PRODUCTS_MAX_LEN = {torch.bfloat16: 512, torch.float32: 48}  # tokens of a sequence up to which `products` is faster


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, dropout_p: float, *, causal: bool = False
) -> Tensor:
    """torch's own; the mask is as that of `scaled_dot_product_attention`."""
    on_cuda, grouped = q.device.type == "cuda", q.shape[1] != k.shape[1]
    if grouped and not (mask is None and _has_flash(q)):  # the only kernel that takes fewer keys than queries
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        grouped = False
    with sdpa_kernel(SDPA_ON_CUDA) if on_cuda else nullcontext():
        out = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal=causal, scale=scaling, enable_gqa=grouped
        )
    return repeatable(out) if on_cuda else out


def repeatable(out: Tensor) -> Tensor:
    """`out`, whose last operator computes its gradients in the same order each time.

    The attention kernels of CUDA add up the gradients of long sequences in any order, unless torch is in its
    deterministic mode; there most operators cost more, and some are refused.
    """
    if out.grad_fn is not None:
        before: list[int] = []

        def begin(*_: object) -> None:
            before.append(torch.get_deterministic_debug_mode())
            torch.set_deterministic_debug_mode("error")  # with "warn" the kernels stay as they are

        def end(*_: object) -> None:
            torch.set_deterministic_debug_mode(before.pop())

        out.grad_fn.register_prehook(begin)
        out.grad_fn.register_hook(end)
    return out


def products(
    q_SHNK: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, dropout_p: float, *, causal: bool = False
) -> Tensor:
    """The same, as the formula has it: scores and probabilities are tensors, which are kept for the backward pass."""
    S, H, n, _ = q_SHNK.shape
    if k.shape[1] != H:
        k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    if causal:
        mask = torch.full((n, n), float("-inf"), dtype=q_SHNK.dtype, device=q_SHNK.device).triu_(1)
    elif mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q_SHNK.dtype).masked_fill_(~mask, float("-inf"))
    scores = torch.bmm((q_SHNK * scaling).flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, (S, H))
    if mask is not None:
        scores += mask
    p = F.dropout(scores.softmax(-1), dropout_p)
    return torch.bmm(p.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (S, H))


def _has_flash(q: Tensor) -> bool:
    """Whether CUDA's flash attention takes `q`."""
    on_cuda, half = q.device.type == "cuda", q.dtype in (torch.float16, torch.bfloat16)
    return on_cuda and half and torch.cuda.get_device_capability(q.device) >= (8, 0)


def has_varlen(q: Tensor) -> bool:
    """Whether flash attention of unlike lengths takes `q`: on CUDA, or on fake tensors of a plan for CUDA."""
    planned = isinstance(q, FakeTensor) and kind_of(q) == "cuda" and q.dtype in (torch.float16, torch.bfloat16)
    return (planned or _has_flash(q)) and why_missing(VARLEN) is None


def varlen(
    q_THK: Tensor,
    k_UGK: Tensor,
    v_UGK: Tensor,
    bounds_q: Tensor,
    bounds_k: Tensor,
    longest_q: int,
    longest_k: int,
    scaling: float,
    window: int | None,
    *,
    causal: bool = True,
) -> Tensor:
    """Flash attention over sequences of unlike length, as torch ships it for CUDA. A sequence may have more keys than
    queries: its last key is its last query's own.

    Args:
        bounds_q: Where each sequence begins, and the end, (S + 1,).
        window: Keys that a query sees, its own among them; None for all.

    Returns:
        (1, T, H, K).
    """
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q_THK,
        k_UGK,
        v_UGK,
        bounds_q,
        bounds_k,
        longest_q,
        longest_k,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0 if causal else -1),
        enable_gqa=q_THK.shape[1] != k_UGK.shape[1],
    )
    assert isinstance(out, Tensor)
    return repeatable(out).unsqueeze(0)
