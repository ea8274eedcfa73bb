"""Attention over several sequences that follow one another in one row, without padding between them.

    out_i = softmax(scaling * q_i K_s^T + bias) V_s      for each token i, over its own sequence s alone

Shapes: T tokens of all sequences, S sequences, H query heads, G key and value heads, K head size, P prefix rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from siliang.capabilities import why_missing
from siliang.ops.context import Context, RowsContext
from siliang.ops.place import kind_of

BUCKET_RATIO = 0.8  # sequences share a bucket where the shortest is at least this share of the longest,
BUCKET_WASTE = 3000  # and shorter ones too while their padded scores are no more: another call costs about as much
PRODUCTS_MAX_LEN = {torch.bfloat16: 512, torch.float32: 48}  # tokens of a sequence up to which _products is faster


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


@dataclass(frozen=True)
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
        longest = wasted = 0
        for n in self.lengths:
            more = abs(longest**2 - n**2)
            if found and (
                min(found[-1][-1], n) >= BUCKET_RATIO * max(longest, n)
                or (wasted + more <= BUCKET_WASTE and n <= longest)
            ):
                found[-1].append(n)
                wasted += more
            else:
                found.append([n])
                wasted = 0
            longest = max(found[-1])
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
    plain = P == 0 and bias_HN is None and dropout_p == 0.0 and (causal or window is None)
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
            mask = real if mask is None else mask.masked_fill(~real, float("-inf"))
        attention = (
            _products if by_products and (impl == "products" or n <= PRODUCTS_MAX_LEN.get(q.dtype, 0)) else _sdpa
        )
        parts.append(bucket.unpad(attention(q, k, v, mask, scaling, dropout_p, causal=causal and mask is None)))
    return torch.cat(parts).unsqueeze(0)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, dropout_p: float, *, causal: bool = False
) -> Tensor:
    if q.shape[1] != k.shape[1] and q.device.type != "cuda":
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p, is_causal=causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )


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
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and why_missing("flash attention of packed rows on CUDA") is None
    )


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float, window: tuple[int, int]) -> Tensor:
    """Flash attention over sequences of unlike length, as torch ships it for CUDA; window: tokens (before, after)."""
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest, grouped = layout.bounds, max(layout.lengths), q.shape[1] != k.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=window, enable_gqa=grouped)
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)
