"""Attention over several sequences that follow one another in one row, without padding between them.

    out_i = softmax(scaling * q_i K_s^T + bias) V_s      for each token i, over its own sequence s alone

Shapes: T tokens of all sequences, S sequences, H query heads, G key and value heads, K head size, P prefix rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from siliang.ops.dense_attention import PRODUCTS_MAX_LEN, has_varlen, products, sdpa, varlen
from siliang.ops.layout import Layout, spread_rows
from siliang.ops.place import kind_of
from siliang.ops.tree_attention import Impl, tree_attention


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
    impl: Impl = "auto",
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
    if layout.tree is not None:
        assert causal and not dropout_p, "a shared beginning has neither a future nor dropout"
        return tree_attention(
            q_1HTK, k_1GTK, v_1GTK, layout, scaling=scaling, bias_HN=bias_HN, window=window, impl=impl
        )
    if impl == "reference":
        mask = _whole_mask(layout, P, q_1HTK, causal=causal, bias_HN=bias_HN, window=window)
        return sdpa(q_1HTK, k_1GTK, v_1GTK, mask, scaling, dropout_p).transpose(1, 2)
    plain = bias_HN is None and dropout_p == 0.0 and (causal or window is None)
    if impl == "varlen" or (impl == "auto" and plain and has_varlen(q_1HTK)):
        return _varlen(q_1HTK, k_1GTK, v_1GTK, layout, scaling, window, causal=causal)
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
        attention = products if by_products and (impl == "products" or n <= PRODUCTS_MAX_LEN.get(q.dtype, 0)) else sdpa
        parts.append(bucket.unpad(attention(q, k, v, mask, scaling, dropout_p, causal=causal and mask is None)))
    return torch.cat(parts).unsqueeze(0)


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


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float, window: int | None, *, causal: bool
) -> Tensor:
    """Flash attention over sequences of unlike length. With a prefix a sequence has more keys than queries."""
    P = k.shape[2] - q.shape[2]
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    longest, bounds = max(layout.lengths), layout.bounds
    bounds_k = bounds
    if P:
        places = prefix_places(layout, P)
        k, v, bounds_k = places.fill(k), places.fill(v), places.bounds
    return varlen(q, k, v, bounds, bounds_k, longest, P + longest, scaling, window, causal=causal)


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
        return spread_rows(copies, self.prefix, rows) + spread_rows(tokens, self.tokens, rows)


@lru_cache(maxsize=2)  # all layers ask for the same
def prefix_places(layout: Layout, P: int) -> PrefixPlaces:
    """The places of a layout's tokens with a prefix of P rows before each sequence."""
    starts = [start + i * P for i, start in enumerate(layout.starts)]
    device = layout.index.device
    tokens = torch.cat([torch.arange(n) + s + P for s, n in zip(starts, layout.lengths, strict=True)])
    prefix = torch.cat([torch.arange(P) + s for s in starts])
    bounds = torch.tensor([*starts, layout.tokens + len(starts) * P], dtype=torch.int32)
    return PrefixPlaces(bounds.to(device), prefix.to(device), tokens.to(device))
