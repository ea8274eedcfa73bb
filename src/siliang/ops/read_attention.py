"""Attention of some tokens of packed sequences to all of their sequences: of those whose result something reads.

    out_i = softmax(scaling * q_i K_s^T + bias) V_s      for each read token i, over its own sequence s

Shapes: T tokens of all sequences, R read ones, S sequences, H query heads, G key and value heads, K head size, P prefix
rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from siliang.ops.dense_attention import PRODUCTS_MAX_LEN, products, sdpa
from siliang.ops.layout import Bucket, Layout, gather_rows, repeat_rows
from siliang.ops.packed_attention import packed_attention
from siliang.ops.place import kind_of


@dataclass(frozen=True, eq=False, kw_only=True)
class ReadLayout(Layout):
    """Where the read tokens of packed sequences lie: a layout of its own, in which a sequence has its read tokens
    alone, perhaps none.

    Attributes:
        whole: The layout of all tokens.
        rows: The places of the read tokens among all, in the order of their sequences, (R,).
        alone: The attention computes the read tokens alone; otherwise all, of which the read ones are taken.
        keys, values: Of all tokens, (1, G, T, K), once they are there.
        attended: What the attention gives, (1, R, H, K), if it has computed all tokens.
    """

    whole: Layout
    rows: Tensor
    alone: bool = True
    attended: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """The place of each read token in its sequence, (R,)."""
        return self.index % self.width

    def select(self, x_1T: Tensor) -> Tensor:
        """(1, T, ...) to (1, R, ...)."""
        take = gather_rows if self.whole.tree is None else repeat_rows  # a shared token is read in several sequences
        return take(x_1T[0], self.rows).unsqueeze(0)

    def after(self, first: FirstPass) -> ReadLayout:
        """The same with what the first pass has made."""
        if first.attended is not None:
            return replace(self, attended=self.select(first.attended))
        _, k, v = first.made[0]
        return replace(self, keys=k, values=v)


class AtAttentionError(Exception):
    """Stops a forward pass at its attention: the rest is not needed."""


@dataclass(eq=False)
class FirstPass:
    """What a pass of all tokens has made up to the attention.

    Attributes:
        attends: It computes the attention.
        made: What the attention was called with: queries, keys and values.
        attended: What it gives, (1, T, H, K).
    """

    attends: bool
    made: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor, Tensor]])
    attended: Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class FirstLayout(Layout):
    """The layout of all tokens for a pass that ends with the attention."""

    whole: Layout
    first: FirstPass

    @classmethod
    def like(cls, whole: Layout, first: FirstPass) -> FirstLayout:
        """As `whole`."""
        return cls(**{f.name: getattr(whole, f.name) for f in fields(Layout)}, whole=whole, first=first)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    scaling: float,
    causal: bool,
    bias_HN: Tensor | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """The attention of a layer, for any layout; the arguments are those of `packed_attention`.

    Raises:
        AtAttentionError: The pass ends here.
    """
    options = partial(
        packed_attention, scaling=scaling, causal=causal, bias_HN=bias_HN, window=window, dropout_p=dropout_p
    )
    if isinstance(layout, FirstLayout):
        first = layout.first
        first.made.append((q, k, v))
        if first.attends:
            first.attended = options(q, k, v, layout.whole)
        raise AtAttentionError
    if isinstance(layout, ReadLayout):
        if layout.attended is not None:
            return layout.attended
        assert layout.keys is not None and layout.values is not None
        k, v = layout.keys, layout.values
        return read_attention(
            q, k, v, layout, scaling=scaling, causal=causal, bias_HN=bias_HN, window=window, dropout_p=dropout_p
        )
    return options(q, k, v, layout)


def read_attention(
    q_1HRK: Tensor,
    k_1GTK: Tensor,
    v_1GTK: Tensor,
    layout: ReadLayout,
    *,
    scaling: float,
    causal: bool,
    bias_HN: Tensor | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
    impl: Literal["auto", "products", "sdpa", "one", "reference"] = "auto",
) -> Tensor:
    """What `packed_attention` gives for the read tokens; the arguments are its own.

    Returns:
        (1, R, H, K).
    """
    whole = layout.whole
    P = k_1GTK.shape[2] - whole.tokens
    if impl == "reference":
        mask = _whole_mask(layout, P, q_1HRK, causal=causal, bias_HN=bias_HN, window=window)
        return sdpa(q_1HRK, k_1GTK, v_1GTK, mask, scaling, dropout_p).transpose(1, 2)
    sizes = [bucket.tokens for bucket in whole.buckets]
    (k_GPK, *ks), (v_GPK, *vs) = (x[0].split([P, *sizes], 1) for x in (k_1GTK, v_1GTK))
    read = _counts(layout)
    places = [sum(counts) for counts in read]
    qs, positions = q_1HRK[0].split(places, 1), layout.positions.split(places)
    parts: list[Tensor] = []
    for bucket, counts, q, at, k, v in zip(whole.buckets, read, qs, positions, ks, vs, strict=True):
        if not sum(counts):
            continue
        queries = Bucket.of(counts, q.device)
        q_SHMK, (k, v) = queries.pad(q), map(bucket.pad, (k, v))
        if P:
            S = len(counts)
            k, v = (torch.cat([x.expand(S, -1, -1, -1), y], 2) for x, y in ((k_GPK, k), (v_GPK, v)))
        at_SM = queries.pad(at[None, :, None])[:, 0, :, 0]  # a place that is padded sees the first token
        mask = _mask(at_SM, bucket, P, q, causal=causal, bias_HN=bias_HN, window=window)
        by = impl if impl != "auto" else _fastest(q_SHMK, k)
        parts.append(queries.unpad(WAYS[by](q_SHMK, k, v, mask, scaling, dropout_p)))
    return torch.cat(parts).unsqueeze(0)


def _counts(layout: ReadLayout) -> list[tuple[int, ...]]:
    """The read tokens of each sequence, by the buckets of all tokens."""
    found, start = list[tuple[int, ...]](), 0
    for bucket in layout.whole.buckets:
        found.append(layout.lengths[start : start + len(bucket.lengths)])
        start += len(bucket.lengths)
    return found


def _one_query(q_SH1K: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, dropout_p: float) -> Tensor:
    """The same element by element for one query of each sequence: a product of such a shape would make oneDNN compile a
    kernel for each length (docs/log.md)."""
    if k.shape[1] != q_SH1K.shape[1]:
        k, v = (x.repeat_interleave(q_SH1K.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q_SH1K * scaling * k).sum(-1)
    if mask is not None:
        mask = mask[:, :, 0]
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    p = F.dropout(scores.softmax(-1), dropout_p)
    return (p[..., None] * v).sum(2, keepdim=True)


WAYS = {"products": products, "sdpa": sdpa, "one": _one_query}


def _fastest(q_SHMK: Tensor, k: Tensor) -> str:
    """The fastest way; on a CPU few scores are computed as a tensor, as in `packed_attention`."""
    M, most = q_SHMK.shape[2], PRODUCTS_MAX_LEN.get(q_SHMK.dtype, 0)
    if kind_of(q_SHMK) != "cpu" or M * k.shape[2] > most**2:
        return "sdpa"
    return "one" if M == 1 and q_SHMK.dtype == torch.bfloat16 else "products"


def _mask(
    at_SM: Tensor, bucket: Bucket, P: int, q: Tensor, *, causal: bool, bias_HN: Tensor | None, window: int | None
) -> Tensor | None:
    """What the read tokens of a bucket may see: (S, 1, M, P + n), or (S, H, M, P + n) with a bias; None for all."""
    j = torch.arange(-P, bucket.width, device=q.device)
    at, seen = at_SM[:, None, :, None], None
    if causal:
        seen = j <= at
    elif bucket.index is not None:
        seen = j < torch.tensor(bucket.lengths, device=q.device)[:, None, None, None]
    if window is not None:
        near = j > at - window
        seen = near if seen is None else seen & near
    if bias_HN is None:
        return seen
    bias = bias_HN[:, None, : len(j)].to(q.dtype)
    return bias[None] if seen is None else bias.masked_fill(~seen, float("-inf"))


def _whole_mask(
    layout: ReadLayout, P: int, q: Tensor, *, causal: bool, bias_HN: Tensor | None, window: int | None
) -> Tensor:
    """The same for all sequences at once: (R, P + T), or (H, R, P + T) with a bias."""
    whole = layout.whole
    i, j = layout.positions[:, None], (whole.index % whole.width)[None]
    seen = (layout.index // whole.width)[:, None] == (whole.index // whole.width)[None]
    before = torch.arange(-P, 0, device=q.device)[None]
    seen = torch.cat([torch.ones(len(i), P, dtype=torch.bool, device=q.device), seen & ((j <= i) | (not causal))], 1)
    j = torch.cat([before, j], 1)
    if window is not None:
        seen = seen & (j > i - window)
    return seen if bias_HN is None else bias_HN.to(q.dtype)[:, j[0] + P][:, None].masked_fill(~seen, float("-inf"))
