"""Causal attention over sequences whose shared beginnings are there once (`ops/beginnings.py`).

    out_i = softmax(scaling * q_i K_i^T + bias) V_i      for each token i; K_i: the keys of the spans above its own, and
                                                         of its own span up to itself

Shapes: T tokens, U = P + T keys with a prefix of P rows in front, S spans of a bucket, n the longest of them, H query
heads, G key and value heads, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from siliang.ops.beginnings import Beginnings
from siliang.ops.cascade import cascaded, parts_of
from siliang.ops.dense_attention import has_varlen, sdpa, varlen
from siliang.ops.layout import Layout, gather_rows, repeat_rows
from siliang.ops.place import kind_of

Impl = Literal["auto", "products", "sdpa", "expanded", "varlen", "reference"]


def tree_attention(
    q_1HTK: Tensor,
    k_1GUK: Tensor,
    v_1GUK: Tensor,
    layout: Layout,
    *,
    scaling: float,
    bias_HN: Tensor | None = None,
    window: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The arguments are those of `packed_attention`.

    Args:
        impl: How it is computed:
            products: the cascade (`ops/cascade.py`), with the scores as tensors;
            sdpa: the cascade, by torch's attention kernel for CPUs;
            expanded: each span has a copy of the keys above it, by sdpa;
            varlen: likewise, by CUDA's kernel for sequences of several lengths;
            reference: one dense mask over all tokens, for tests;
            auto: the fastest of them here.

    Returns:
        (1, T, H, K).
    """
    P, device = k_1GUK.shape[2] - q_1HTK.shape[2], q_1HTK.device.type
    if torch.is_autocast_enabled(device):  # q and k come in fp32 from their rotation, v in half
        half = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            q, k, v = (x.to(half) for x in (q_1HTK, k_1GUK, v_1GUK))
            return tree_attention(q, k, v, layout, scaling=scaling, bias_HN=bias_HN, window=window, impl=impl)
    if impl == "reference":
        mask = _whole_mask(layout, P, q_1HTK, bias_HN, window)
        return sdpa(q_1HTK, k_1GUK, v_1GUK, mask, scaling, 0.0).transpose(1, 2)
    if impl == "varlen" or (impl == "auto" and bias_HN is None and has_varlen(q_1HTK)):
        keys = _path_keys(layout, P)
        k, v = (repeat_rows(x[0].transpose(0, 1), keys.index) for x in (k_1GUK, v_1GUK))
        q = q_1HTK[0].transpose(0, 1)
        return varlen(q, k, v, keys.bounds_q, keys.bounds, keys.longest_q, keys.longest, scaling, window)
    if impl == "expanded" or window is not None or (impl == "auto" and kind_of(q_1HTK) != "cpu"):
        return _expanded(q_1HTK, k_1GUK, v_1GUK, layout, scaling, bias_HN, window)
    by_products = None if impl == "auto" else impl == "products"
    q, k, v = q_1HTK[0], k_1GUK[0], v_1GUK[0]
    out = cascaded(q, k, v, layout, scaling=scaling, bias_HN=bias_HN, by_products=by_products)
    return out.unsqueeze(0)


@dataclass(frozen=True, eq=False)
class PathKeys:
    """The keys of each span and of those above it, the prefix first.

    Attributes:
        index: Of each, its place among the U keys, one span after the other.
        positions: Of each, in its sequence; -P to -1 for the prefix.
        lengths: How many each span has.
        bounds: Where each span's begin, and the end; `bounds_q` those of its queries.
    """

    index: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    longest_q: int
    bounds: Tensor
    bounds_q: Tensor

    @property
    def longest(self) -> int:
        """Of the lengths."""
        return max(self.lengths)


@lru_cache(maxsize=2)
def _path_keys(layout: Layout, P: int) -> PathKeys:
    tree, device = _tree_of(layout), layout.index.device
    prefix = np.arange(P)
    paths = [np.concatenate([prefix, P + tree.tokens_to(i)]) for i in range(len(tree.spans))]
    positions = [np.arange(len(path)) - P for path in paths]
    lengths = tuple(map(len, paths))
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return PathKeys(
        torch.from_numpy(np.concatenate(paths)).to(device),
        torch.from_numpy(np.concatenate(positions)).to(device),
        lengths,
        max(span.length for span in tree.spans),
        bounds.to(device),
        torch.tensor(tree.offsets, dtype=torch.int32).to(device),
    )


def _expanded(
    q_1HTK: Tensor,
    k_1GUK: Tensor,
    v_1GUK: Tensor,
    layout: Layout,
    scaling: float,
    bias_HN: Tensor | None,
    window: int | None,
) -> Tensor:
    """By torch's attention, with a copy of its keys for each span."""
    P = k_1GUK.shape[2] - q_1HTK.shape[2]
    keys, parts = _path_keys(layout, P), parts_of(layout, P)
    starts = list(accumulate(keys.lengths, initial=0))
    q, k, v = (x[0].transpose(0, 1) for x in (q_1HTK, k_1GUK, v_1GUK))
    outputs: list[Tensor] = []
    for own in parts.own:
        of, S, n = own.spans, len(own.spans), own.width
        most = max(keys.lengths[i] for i in of)
        # padded in front, by keys of positions that no query sees
        places = torch.tensor([[max(starts[i + 1] - most + j, starts[i]) for j in range(most)] for i in of])
        lacking = torch.tensor([[most - keys.lengths[i]] for i in of])
        places, lacking = places.to(q.device), lacking.to(q.device)
        at = keys.positions[places]
        seen = (at[:, None, :] <= own.positions[:, :, None]) & (torch.arange(most, device=q.device) >= lacking)[:, None]
        if window is not None:
            seen = seen & (at[:, None, :] > own.positions[:, :, None] - window)
        mask = seen[:, None]
        if bias_HN is not None:
            bias = bias_HN[:, at + P].transpose(0, 1).unsqueeze(2).to(q.dtype)
            mask = bias.masked_fill(~mask, float("-inf"))
        index = keys.index[places].flatten()
        own_k, own_v = (repeat_rows(x, index).unflatten(0, (S, most)).transpose(1, 2) for x in (k, v))
        own_q = repeat_rows(q, own.index).unflatten(0, (S, n)).transpose(1, 2)
        found = sdpa(own_q, own_k, own_v, mask, scaling, 0.0)
        outputs.append(gather_rows(found.transpose(1, 2).flatten(0, 1), own.real))
    order = torch.cat([own.tokens for own in parts.own]).argsort()
    return gather_rows(torch.cat(outputs), order).unsqueeze(0)


def _whole_mask(layout: Layout, P: int, q: Tensor, bias_HN: Tensor | None, window: int | None) -> Tensor:
    """What each token may see, (T, U), or (H, T, U) with a bias."""
    tree = _tree_of(layout)
    seen = torch.zeros(tree.tokens, P + tree.tokens, dtype=torch.bool)
    for i, span in enumerate(tree.spans):
        path = torch.from_numpy(tree.tokens_to(i))
        seen[tree.offsets[i] : tree.offsets[i] + span.length, P + path] = True
    at = torch.from_numpy(tree.positions)
    of_keys = torch.cat([torch.arange(-P, 0), at])
    seen[:, :P] = True
    seen &= of_keys[None] <= at[:, None]
    if window is not None:
        seen &= of_keys[None] > at[:, None] - window
    seen = seen.to(q.device)
    if bias_HN is None:
        return seen
    return bias_HN[:, None, (of_keys + P).to(q.device)].to(q.dtype).masked_fill(~seen, float("-inf"))


def _tree_of(layout: Layout) -> Beginnings:
    assert layout.tree is not None
    return layout.tree
