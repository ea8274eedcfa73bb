"""The cascade: causal attention over a tree of sequences (`ops/tree_attention.py`), part by part.

A part is a span's attention to itself, or that of all tokens below a shared span to that span, whose keys no sequence
copies. The parts meet by their sums of exponentials:

    lse_p = log sum_j e^(s_pj),   lse = log sum_p e^(lse_p),   out = sum_p e^(lse_p - lse) out_p

Backward, a part needs no other: with P_p = e^(s_p - lse) and D = rowsum(dO * O),  dV_p = P_p^T dO and
dS_p = P_p * (dO V_p^T - D), as in flash attention (Dao et al. 2022, arXiv 2205.14135).

Shapes: T tokens, U = P + T keys with a prefix of P rows in front, S spans of a part, n the longest of them, H query
heads, G key and value heads, K head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from siliang.ops.context import Context
from siliang.ops.dense_attention import PRODUCTS_MAX_LEN
from siliang.ops.layout import Layout, neighbours

CASCADE = "shared beginnings"  # a row of CAPABILITIES
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def cascaded(
    q_HTK: Tensor,
    k_GUK: Tensor,
    v_GUK: Tensor,
    layout: Layout,
    *,
    scaling: float,
    bias_HN: Tensor | None = None,
    by_products: bool | None = None,
) -> Tensor:
    """The attention of a layout's tree, on a CPU.

    Args:
        bias_HN: Added to the scores of a sequence's keys, by head and position, prefix first.
        by_products: Compute the scores as tensors, and not by torch's kernel; None for what is faster.

    Returns:
        (T, H, K).
    """
    parts = parts_of(layout, k_GUK.shape[1] - q_HTK.shape[1])
    out: Tensor = _Cascade.apply(q_HTK, k_GUK, v_GUK, parts, bias_HN, scaling, by_products)
    return out


@dataclass(frozen=True, eq=False)
class Own:
    """Spans that attend each to itself, in one call.

    Attributes:
        spans, width: Their numbers, and the tokens of the longest.
        start: Where they begin, if they follow one another and are of one length; None otherwise.
        index: Each token once they are padded to `width` by their last ones, (S * width,).
        real: The places of those that are not padding, (N,).
        tokens: These tokens, (N,).
        positions: Of each place, (S, width).
        prefix: P.
    """

    spans: tuple[int, ...]
    width: int
    start: int | None
    index: Tensor
    real: Tensor
    tokens: Tensor
    positions: Tensor
    prefix: int

    causal = True

    def queries(self, x_HTK: Tensor, groups: int) -> Tensor:
        """(H, T, K) to (S, H, width, K)."""
        return self._take(x_HTK, 0)

    def keys(self, x_GUK: Tensor) -> Tensor:
        """(G, U, K) to (S, G, width, K)."""
        return self._take(x_GUK, self.prefix)

    def gradients(self, x_HTK: Tensor, groups: int) -> Tensor:
        """As `queries`, with zeros at the padding, whose outputs nothing reads."""
        found = self._take(x_HTK, 0)
        if len(self.real) == len(self.index):
            return found
        real = found.new_zeros(len(self.index)).index_fill_(0, self.real, 1.0)
        return found * real.view(len(self.spans), 1, self.width, 1)

    def put_queries(self, x_SHNK: Tensor, into_THK: Tensor) -> None:
        """The way back of `queries`."""
        self._put(x_SHNK, into_THK, 0)

    def add_keys(self, x_SGNK: Tensor, to_UGK: Tensor) -> None:
        """The way back of `keys`, where nothing was added before."""
        self._put(x_SGNK, to_UGK, self.prefix)

    def bias(self, bias_HN: Tensor, q: Tensor, groups: int) -> Tensor:
        """What is added to the scores, (S, H, width, width), without what may not be seen."""
        at = (self.positions + self.prefix).clamp(max=bias_HN.shape[1] - 1)
        bias = bias_HN[:, at].transpose(0, 1).unsqueeze(2).to(q.dtype)
        ahead = torch.ones(self.width, self.width, dtype=torch.bool, device=q.device).triu_(1)
        return bias.masked_fill(ahead, float("-inf"))

    def _take(self, x: Tensor, offset: int) -> Tensor:
        shape = (len(self.spans), self.width)
        if self.start is not None:
            first = offset + self.start
            return x[:, first : first + len(self.spans) * self.width].unflatten(1, shape).transpose(0, 1)
        return x.transpose(0, 1).index_select(0, self.index + offset).unflatten(0, shape).transpose(1, 2)

    def _put(self, x: Tensor, into: Tensor, offset: int) -> None:
        flat = x.transpose(1, 2).flatten(0, 1)
        if self.start is not None:
            into[offset + self.start : offset + self.start + len(flat)] = flat
        else:
            into[self.tokens + offset] = flat.index_select(0, self.real).to(into.dtype)


@dataclass(frozen=True)
class Trunk:
    """The keys `first` to `last` of U, all of which the tokens from `start` to `stop` see.

    The query heads of a group are as many times the queries: (H, n, K) is (1, G, H / G * n, K), and no key is repeated.

    Attributes:
        position: The first key's among a sequence's keys, the prefix included.
    """

    first: int
    last: int
    start: int
    stop: int
    position: int

    causal = False

    def queries(self, x_HTK: Tensor, groups: int) -> Tensor:
        """(H, T, K) to (1, G, H / G * n, K)."""
        return x_HTK[:, self.start : self.stop].unflatten(0, (groups, -1)).flatten(1, 2).unsqueeze(0)

    gradients = queries

    def keys(self, x_GUK: Tensor) -> Tensor:
        """(G, U, K) to (1, G, last - first, K)."""
        return x_GUK[:, self.first : self.last].unsqueeze(0)

    def of_tokens(self, x: Tensor, heads: int) -> Tensor:
        """The way back of `queries`: (1, G, H / G * n, K) to (n, H, K)."""
        return x[0].unflatten(1, (heads // x.shape[1], -1)).flatten(0, 1).transpose(0, 1)

    def add_keys(self, x_1GLK: Tensor, to_UGK: Tensor) -> None:
        """The way back of `keys`."""
        to_UGK[self.first : self.last] += x_1GLK[0].transpose(0, 1)

    def bias(self, bias_HN: Tensor, q: Tensor, groups: int) -> Tensor:
        """What is added to the scores, (1, G, H / G * n, last - first)."""
        own = bias_HN[:, self.position : self.position + self.last - self.first].to(q.dtype)
        return own.unsqueeze(1).expand(-1, self.stop - self.start, -1).unflatten(0, (groups, -1)).flatten(1, 2)[None]


@dataclass(frozen=True, eq=False)
class CascadeParts:
    """The parts of one tree's attention: each token is in one of `own`."""

    own: tuple[Own, ...]
    trunks: tuple[Trunk, ...]


class CascadeContext(Context, Protocol):
    """Of the cascade: its parts, and how each is computed."""

    parts: CascadeParts
    bias: Tensor | None
    scaling: float
    by_products: bool | None


class _Cascade(torch.autograd.Function):
    """(H, T, K), (G, U, K), (G, U, K) to (T, H, K)."""

    @staticmethod
    def forward(
        ctx: CascadeContext,
        q_HTK: Tensor,
        k_GUK: Tensor,
        v_GUK: Tensor,
        parts: CascadeParts,
        bias_HN: Tensor | None,
        scaling: float,
        by_products: bool | None,
    ) -> Tensor:
        (H, T, K), G = q_HTK.shape, len(k_GUK)
        exact = torch.promote_types(q_HTK.dtype, torch.float32)
        out, lse = (q_HTK.new_empty(shape, dtype=exact) for shape in ((T, H, K), (T, H, 1)))
        saved: list[Tensor] = []
        for part in (*parts.own, *parts.trunks):
            q, k, v = part.queries(q_HTK, G), part.keys(k_GUK), part.keys(v_GUK)
            bias = None if bias_HN is None else part.bias(bias_HN, q, G)
            o, sums, kept = _attend(q, k, v, bias, part.causal, scaling, by_products)
            saved += kept
            if isinstance(part, Own):
                part.put_queries(o, out)
                part.put_queries(sums, lse)
                continue
            o, sums = part.of_tokens(o, H), part.of_tokens(sums, H)
            so_far, out_so_far = lse[part.start : part.stop], out[part.start : part.stop]
            both = torch.logaddexp(so_far, sums)
            out_so_far.mul_(so_far.sub_(both).exp_()).add_(o * (sums - both).exp_())
            so_far.copy_(both)
        out = out.to(q_HTK.dtype)
        ctx.save_for_backward(q_HTK, k_GUK, v_GUK, out, lse, *saved)
        ctx.parts, ctx.bias, ctx.scaling, ctx.by_products = parts, bias_HN, scaling, by_products
        return out

    @staticmethod
    def backward(ctx: CascadeContext, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (d_THK,) = gradients
        q_HTK, k_GUK, v_GUK, out, lse, *kept = ctx.saved_tensors
        (H, T, K), (G, U, _), saved = q_HTK.shape, k_GUK.shape, iter(kept)
        delta = (d_THK.to(lse.dtype) * out).sum(-1, keepdim=True)
        d_HTK, out, lse, delta = (x.transpose(0, 1) for x in (d_THK, out, lse, delta))
        dq = lse.new_empty(T, H, K)
        dk, dv = lse.new_zeros(U, G, K), lse.new_zeros(U, G, K)
        for part in (*ctx.parts.own, *ctx.parts.trunks):
            q, k, v = part.queries(q_HTK, G), part.keys(k_GUK), part.keys(v_GUK)
            d, e = part.gradients(d_HTK, G), part.gradients(delta, G)
            o, sums = part.queries(out, G), part.queries(lse, G)
            bias = None if ctx.bias is None else part.bias(ctx.bias, q, G)
            x, y, z = _differentiate(q, k, v, bias, d, o, sums, e, saved, part.causal, ctx.scaling, ctx.by_products)
            part.add_keys(y, dk)
            part.add_keys(z, dv)
            if isinstance(part, Own):
                part.put_queries(x, dq)
            else:
                dq[part.start : part.stop] += part.of_tokens(x, H)
        dq, dk, dv = (x.to(q_HTK.dtype).transpose(0, 1) for x in (dq, dk, dv))
        return dq, dk, dv, None, None, None, None


def _by_products(q: Tensor, k: Tensor, by_products: bool | None) -> bool:
    if q.dtype == torch.float64:  # which torch's kernel computes, too, and less exactly
        return True
    return k.shape[2] <= PRODUCTS_MAX_LEN.get(q.dtype, 0) if by_products is None else by_products


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scaling: float, by_products: bool | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One part: its output, the logarithms of its sums of exponentials (S, H, n, 1), and what backward needs of it.

    Args:
        bias: With it, what may not be seen is in it.
    """
    k, v = _repeated(k, q), _repeated(v, q)
    if not _by_products(q, k, by_products):
        out, sums = _FLASH(q, k, v, 0.0, causal and bias is None, attn_mask=bias, scale=scaling)
        return out, sums.unsqueeze(-1), []
    scores = torch.matmul(q * scaling, k.mT)
    if bias is not None:
        scores += bias
    elif causal:
        n = q.shape[2]
        scores += torch.full((n, n), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
    p = scores.softmax(-1)
    exact = torch.promote_types(q.dtype, torch.float32)
    # the largest of both: e^(most - sums) = largest
    sums = scores.amax(-1, keepdim=True).to(exact) - p.amax(-1, keepdim=True).to(exact).log()
    return torch.matmul(p, v), sums, [p, sums]


def _differentiate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    d: Tensor,
    out: Tensor,
    sums: Tensor,
    delta: Tensor,
    saved: Iterator[Tensor],
    causal: bool,
    scaling: float,
    by_products: bool | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of one part.

    Args:
        d, out, sums, delta: Of the whole attention: the gradient of its output, its output, the logarithms of its sums
            of exponentials, and the sums of both products (S, H, n, 1).
        saved: Of all parts yet to come.
    """
    G = k.shape[1]
    k, v = _repeated(k, q), _repeated(v, q)
    if not _by_products(q, k, by_products):
        dq, dk, dv = _FLASH_BACKWARD(
            d, q, k, v, out, sums.squeeze(-1), 0.0, causal and bias is None, attn_mask=bias, scale=scaling
        )
    else:
        p, own = next(saved), next(saved)
        share = (own - sums).exp_()  # of this part: p is e^(s - own), and the whole attention's e^(s - sums)
        d, delta = (d * share).to(q.dtype), (delta * share).to(q.dtype)
        dv = torch.matmul(p.mT, d)
        ds = torch.matmul(d, v.mT).sub_(delta).mul_(p)
        dq, dk = torch.matmul(ds, k) * scaling, torch.matmul(ds.mT, q * scaling)
    if k.shape[1] != G:
        dk, dv = (x.unflatten(1, (G, -1)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _repeated(k: Tensor, q: Tensor) -> Tensor:
    """Keys or values with a head for each of the queries'."""
    return k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], 1)


@lru_cache(maxsize=2)  # all layers ask for the same
def parts_of(layout: Layout, P: int) -> CascadeParts:
    """The parts of a layout's tree behind a prefix of P rows."""
    tree, device = layout.tree, layout.index.device
    assert tree is not None
    own: list[Own] = []
    numbers = sorted(range(len(tree.spans)), key=lambda i: (-tree.spans[i].length, i))
    for group in neighbours([tree.spans[i].length for i in numbers], "cpu"):
        of = sorted(numbers[i] for i in group)
        lengths = [tree.spans[i].length for i in of]
        width, firsts = max(lengths), [tree.offsets[i] for i in of]
        follow = of == list(range(of[0], of[0] + len(of))) and min(lengths) == width
        columns = np.minimum(np.arange(width)[None], np.array(lengths)[:, None] - 1)
        index = np.array(firsts)[:, None] + columns
        real = (np.arange(width)[None] < np.array(lengths)[:, None]).reshape(-1).nonzero()[0]
        arrays = (index.reshape(-1), real, index.reshape(-1)[real], tree.positions[index])
        flat, places, tokens, positions = (torch.from_numpy(x).to(device) for x in arrays)
        own.append(Own(tuple(of), width, firsts[0] if follow else None, flat, places, tokens, positions, P))
    trunks = [Trunk(0, P, 0, tree.tokens, 0)] if P else []
    for i, span in enumerate(tree.spans):
        if span.end > i + 1:
            first, last, stop = tree.offsets[i], tree.offsets[i + 1], tree.offsets[span.end]
            trunks.append(Trunk(P + first, P + last, last, stop, P + span.start))
    return CascadeParts(tuple(own), tuple(trunks))
