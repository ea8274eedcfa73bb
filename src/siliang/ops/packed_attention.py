"""Attention over several sequences that follow one another in one row, without padding between them.

    out_i = softmax(scaling * q_i K_s^T + bias) V_s      for each token i, over its own sequence s alone

Shapes: T tokens of all sequences, S sequences, H query heads, G key and value heads, K head size, P prefix rows.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from siliang.capabilities import why_missing
from siliang.ops.context import Context, RowsContext
from siliang.ops.place import kind_of

BUCKET_RATIO = 0.8  # sequences share a bucket where the shortest is at least this share of the longest,
# and shorter ones too while their padded scores are no more than this: another call costs about as much
BUCKET_WASTE = {"cpu": 3_000, "cuda": 300_000}
# Those of CUDA but cuDNN's: it plans anew for each shape, which takes 2 ms, and the shapes of buckets seldom return.
SDPA_ON_CUDA = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PRODUCTS_MAX_LEN = {torch.bfloat16: 512, torch.float32: 48}  # tokens of a sequence up to which _products is faster


VARLEN = "flash attention of packed rows on CUDA"  # a row of CAPABILITIES


@dataclass(frozen=True)
class Bucket:
    """Sequences that attention computes in one call.

    Attributes:
        width: Tokens of the longest.
        index: The place of each token once they are padded to `width`; None where all are as long.
    """

    lengths: tuple[int, ...]
    width: int
    index: Tensor | None

    @property
    def tokens(self) -> int:
        """Of all of them."""
        return sum(self.lengths)

    def pad(self, x_HTK: Tensor) -> Tensor:
        """(H, tokens, K) to (S, H, width, K)."""
        S = len(self.lengths)
        if self.index is None:
            return x_HTK.unflatten(1, (S, self.width)).transpose(0, 1)
        return _spread(x_HTK.transpose(0, 1), self.index, S * self.width).unflatten(0, (S, self.width)).transpose(1, 2)

    def unpad(self, x_SHNK: Tensor) -> Tensor:
        """The way back: (S, H, width, K) to (tokens, H, K)."""
        flat = x_SHNK.transpose(1, 2).flatten(0, 1)
        return flat if self.index is None else _gather(flat, self.index)

    def real(self, device: torch.device) -> Tensor | None:
        """Which keys are not padding, (S, 1, 1, width); None where all are none."""
        if self.index is None:
            return None
        lengths = torch.tensor(self.lengths, device=device)
        return (torch.arange(self.width, device=device) < lengths[:, None])[:, None, None]


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the sequences of a padded batch lie once the padding is gone.

    Attributes:
        lengths: Tokens of each sequence.
        width: Columns of the padded batch.
        index: The place of each token in the flattened batch, (T,).
    """

    lengths: tuple[int, ...]
    width: int
    index: Tensor

    @classmethod
    def of(cls, lengths: tuple[int, ...], width: int, device: torch.device) -> Layout:
        """Of a batch that is padded on the right."""
        if min(lengths) == width:
            index = torch.arange(len(lengths) * width, device=device)
        else:
            index = torch.cat([torch.arange(n) + i * width for i, n in enumerate(lengths)]).to(device)
        return cls(lengths, width, index)

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each sequence begins."""
        starts = [0]
        for n in self.lengths[:-1]:
            starts.append(starts[-1] + n)
        return tuple(starts)

    @cached_property
    def bounds(self) -> Tensor:
        """Where each sequence begins, and T, (S + 1,)."""
        return torch.tensor((*self.starts, self.tokens), dtype=torch.int32).to(self.index.device)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Neighbours of about the same length, which are computed in one; sorted rows make the fewest."""
        found: list[list[int]] = []
        most_waste = BUCKET_WASTE["cuda" if kind_of(self.index) == "cuda" else "cpu"]
        longest = shortest = wasted = 0  # of the last bucket
        for n in self.lengths:
            if found and (
                min(shortest, n) >= BUCKET_RATIO * max(longest, n)
                or (n <= longest and wasted + longest**2 - n**2 <= most_waste)
            ):
                wasted += len(found[-1]) * max(n**2 - longest**2, 0) + max(longest**2 - n**2, 0)
                longest, shortest = max(longest, n), min(shortest, n)
                found[-1].append(n)
            else:
                longest, shortest, wasted = n, n, 0
                found.append([n])
        buckets: list[Bucket] = []
        for lengths in found:
            width = max(lengths)
            whole = min(lengths) == width
            index = None if whole else Layout.of(tuple(lengths), width, self.index.device).index
            buckets.append(Bucket(tuple(lengths), width, index))
        return tuple(buckets)

    def pack(self, x: Tensor) -> Tensor:
        """(S, width, ...) to (1, T, ...)."""
        return _gather(x.flatten(0, 1), self.index).unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """(1, T, ...) to (S, width, ...), with zeros where the padding was."""
        S = len(self.lengths)
        return _spread(x[0], self.index, S * self.width).unflatten(0, (S, self.width))


class _Gather(torch.autograd.Function):
    """Some rows of x, none twice; unlike index_select's, its backward pass need not add up."""

    @staticmethod
    def forward(ctx: RowsContext, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: RowsContext, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        (index,) = ctx.saved_tensors
        return _spread(dy, index, ctx.rows), None


class _Spread(torch.autograd.Function):
    """The way back: rows of x at their places among zeros."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        (index,) = ctx.saved_tensors
        return _gather(dy, index), None, None


def _gather(x: Tensor, index: Tensor) -> Tensor:
    return _Gather.apply(x, index)


def _spread(x: Tensor, index: Tensor, rows: int) -> Tensor:
    return _Spread.apply(x, index, rows)


def packed_attention(
    q_1HTK: Tensor,
    k_1GTK: Tensor,
    v_1GTK: Tensor,
    layout: Layout,
    *,
    scaling: float,
    causal: bool,
    bias_HN: Tensor | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
    impl: Literal["auto", "products", "sdpa", "varlen", "reference"] = "auto",
) -> Tensor:
    """Attention of each sequence to itself.

    Args:
        k_1GTK: May have P rows more in front than q: a prefix, which is before each sequence. Likewise v.
        causal: A token sees those before it in its sequence, and itself; otherwise all of its sequence.
        bias_HN: Added to the scores of a sequence's keys, by head and position, prefix first (BLOOM's alibi). At least
            as long as the longest sequence.
        window: A token sees so many tokens before it, itself among them (Mistral's sliding window), a prefix's too.
        impl: reference is one attention over the whole row, with a mask; varlen is CUDA's; products computes the
            scores as a tensor, which on a CPU is faster for short sequences; auto chooses.

    Returns:
        (1, T, H, K).
    """
    P = k_1GTK.shape[2] - q_1HTK.shape[2]
    if window is not None and window >= P + max(layout.lengths):
        window = None
    if impl == "reference":
        mask = _whole_mask(layout, P, q_1HTK, causal=causal, bias_HN=bias_HN, window=window)
        return _sdpa(q_1HTK, k_1GTK, v_1GTK, mask, scaling, dropout_p).transpose(1, 2)
    plain = bias_HN is None and dropout_p == 0.0 and (causal or window is None)
    if impl == "varlen" or (impl == "auto" and plain and _has_varlen(q_1HTK)):
        return _varlen(
            q_1HTK, k_1GTK, v_1GTK, layout, scaling, (-1 if window is None else window - 1, 0 if causal else -1)
        )
    parts: list[Tensor] = []
    by_products = impl == "products" or (impl == "auto" and kind_of(q_1HTK) == "cpu")
    # split, and not sliced one by one: the backward pass of a slice is as large as all of them
    sizes = [bucket.tokens for bucket in layout.buckets]
    (k_GPK, *ks), (v_GPK, *vs) = (x[0].split([P, *sizes], 1) for x in (k_1GTK, v_1GTK))
    for bucket, *part in zip(layout.buckets, q_1HTK[0].split(sizes, 1), ks, vs, strict=True):
        S, n = len(bucket.lengths), bucket.width
        q, k, v = map(bucket.pad, part)
        if P:
            k, v = (torch.cat([x.expand(S, -1, -1, -1), y], 2) for x, y in ((k_GPK, k), (v_GPK, v)))
        mask = None
        if bias_HN is not None or window is not None or (P and causal):
            mask = _mask(n, P, q, causal=causal, window=window, bias_HN=bias_HN)
        # padding is on the right, where causal attention does not look
        real = None if causal else bucket.real(q.device)
        if real is not None:
            real = F.pad(real, (P, 0), value=True)
            if window is not None:  # padding sees itself: a softmax over nothing is NaN
                real = real | F.pad(torch.eye(n, dtype=torch.bool, device=q.device), (P, 0))
            if mask is None or mask.dtype == torch.bool:
                mask = real if mask is None else mask & real
            else:
                mask = mask.masked_fill(~real, float("-inf"))
        attention = (
            _products if by_products and (impl == "products" or n <= PRODUCTS_MAX_LEN.get(q.dtype, 0)) else _sdpa
        )
        parts.append(bucket.unpad(attention(q, k, v, mask, scaling, dropout_p, causal=causal and mask is None)))
    return torch.cat(parts).unsqueeze(0)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, dropout_p: float, *, causal: bool = False
) -> Tensor:
    on_cuda, grouped = q.device.type == "cuda", q.shape[1] != k.shape[1]
    if grouped and not on_cuda:
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


def _products(
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


def _mask(n: int, P: int, q: Tensor, *, causal: bool, window: int | None, bias_HN: Tensor | None) -> Tensor:
    """What one sequence of `n` tokens may see: (n, P + n), or (H, n, P + n) with a bias."""
    i, j = torch.arange(n, device=q.device)[:, None], torch.arange(-P, n, device=q.device)[None, :]
    seen = (j <= i) | (not causal)
    if window is not None:
        seen = seen & (j > i - window)
    if bias_HN is None:
        return seen
    return bias_HN[:, None, : P + n].to(q.dtype).masked_fill(~seen, float("-inf"))


def _whole_mask(
    layout: Layout, P: int, q: Tensor, *, causal: bool, window: int | None, bias_HN: Tensor | None
) -> Tensor:
    """The same for all sequences in one square."""
    T, H = layout.tokens, q.shape[1]
    shape = (T, P + T) if bias_HN is None else (H, T, P + T)
    kind = torch.bool if bias_HN is None else q.dtype
    whole = torch.full(shape, False if bias_HN is None else float("-inf"), dtype=kind, device=q.device)
    for start, n in zip(layout.starts, layout.lengths, strict=True):
        one = _mask(n, P, q, causal=causal, window=window, bias_HN=bias_HN)
        whole[..., start : start + n, :P] = one[..., :P]
        whole[..., start : start + n, P + start : P + start + n] = one[..., P:]
    return whole


def _has_varlen(q: Tensor) -> bool:
    """Whether flash attention of unlike lengths takes `q`: on CUDA, or on fake tensors of a plan for CUDA."""
    if kind_of(q) != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0):
        return False
    return (q.device.type == "cuda" or isinstance(q, FakeTensor)) and why_missing(VARLEN) is None


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float, window: tuple[int, int]) -> Tensor:
    """Flash attention over sequences of unlike length, as torch ships it for CUDA; window: tokens (before, after). With
    a prefix a sequence has more keys than queries: the last key is the last query's own."""
    from torch.nn.attention.varlen import varlen_attn

    P, grouped = k.shape[2] - q.shape[2], q.shape[1] != k.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    longest, bounds = max(layout.lengths), layout.bounds
    bounds_k = bounds
    if P:
        places = prefix_places(layout, P)
        k, v, bounds_k = places.fill(k), places.fill(v), places.bounds
    out = varlen_attn(
        q, k, v, bounds, bounds_k, longest, P + longest, scale=scaling, window_size=window, enable_gqa=grouped
    )
    assert isinstance(out, Tensor)
    return repeatable(out).unsqueeze(0)


@dataclass(frozen=True)
class PrefixPlaces:
    """Where the rows are once each sequence has a copy of the prefix before it.

    Attributes:
        bounds: Where each sequence begins, its prefix first, and the end, (S + 1,).
        prefix: The places of the copies, (S * P,).
        tokens: The places of the tokens, (T,).
    """

    bounds: Tensor
    prefix: Tensor
    tokens: Tensor

    def fill(self, x: Tensor) -> Tensor:
        """(P + T, G, K), the prefix once, to (S * P + T, G, K)."""
        S = len(self.bounds) - 1
        P, rows = len(self.prefix) // S, len(self.prefix) + len(self.tokens)
        prefix, tokens = x.split([P, len(x) - P])
        copies = prefix.expand(S, *prefix.shape).flatten(0, 1)
        return _spread(copies, self.prefix, rows) + _spread(tokens, self.tokens, rows)


@lru_cache(maxsize=2)  # all layers ask for the same
def prefix_places(layout: Layout, P: int) -> PrefixPlaces:
    """The places of a layout's tokens with a prefix of P rows before each sequence."""
    starts = [start + i * P for i, start in enumerate(layout.starts)]
    device = layout.index.device
    tokens = torch.cat([torch.arange(n) + s + P for s, n in zip(starts, layout.lengths, strict=True)])
    prefix = torch.cat([torch.arange(P) + s for s in starts])
    bounds = torch.tensor([*starts, layout.tokens + len(starts) * P], dtype=torch.int32)
    return PrefixPlaces(bounds.to(device), prefix.to(device), tokens.to(device))
