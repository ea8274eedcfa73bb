"""Where the sequences of a padded batch lie once its padding is gone.

Shapes: S sequences, T tokens of all of them, H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from siliang.ops.beginnings import Beginnings
from siliang.ops.context import Context, RowsContext
from siliang.ops.place import kind_of

BUCKET_RATIO = 0.8  # sequences share a bucket where the shortest is at least this share of the longest,
# and shorter ones too while their padded scores are no more than this: another call costs about as much
BUCKET_WASTE = {"cpu": 3_000, "cuda": 300_000}


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

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> Bucket:
        """Of sequences of these lengths."""
        width = max(lengths)
        whole = min(lengths) == width
        return cls(lengths, width, None if whole else Layout.of(lengths, width, device).index)

    @property
    def tokens(self) -> int:
        """Of all of them."""
        return sum(self.lengths)

    def pad(self, x_HTK: Tensor) -> Tensor:
        """(H, tokens, K) to (S, H, width, K)."""
        S = len(self.lengths)
        if self.index is None:
            return x_HTK.unflatten(1, (S, self.width)).transpose(0, 1)
        return (
            spread_rows(x_HTK.transpose(0, 1), self.index, S * self.width).unflatten(0, (S, self.width)).transpose(1, 2)
        )

    def unpad(self, x_SHNK: Tensor) -> Tensor:
        """The way back: (S, H, width, K) to (tokens, H, K)."""
        flat = x_SHNK.transpose(1, 2).flatten(0, 1)
        return flat if self.index is None else gather_rows(flat, self.index)

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
        index: The place of each token in the flattened batch, (T,); of a shared one, that in one of its sequences.
        tree: The tree of the sequences; None where each token is of one sequence.
        on_attention: Called by each attention that computes with it, with whether that is causal, and with its window.
    """

    lengths: tuple[int, ...]
    width: int
    index: Tensor
    tree: Beginnings | None = None
    on_attention: Callable[[bool, int | None], None] | None = None

    @classmethod
    def of(
        cls,
        lengths: tuple[int, ...],
        width: int,
        device: torch.device,
        tree: Beginnings | None = None,
        on_attention: Callable[[bool, int | None], None] | None = None,
    ) -> Layout:
        """Of a batch that is padded on the right."""
        if tree is not None:
            index = torch.from_numpy(tree.rows * width + tree.positions).to(device)
        elif min(lengths) == width:
            index = torch.arange(len(lengths) * width, device=device)
        else:
            index = torch.cat([torch.arange(n) + i * width for i, n in enumerate(lengths)]).to(device)
        return cls(lengths, width, index, tree, on_attention)

    @property
    def tokens(self) -> int:
        """T."""
        return self.tree.tokens if self.tree is not None else sum(self.lengths)

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
        kind = kind_of(self.index)
        found = (tuple(self.lengths[i] for i in group) for group in neighbours(self.lengths, kind))
        return tuple(Bucket.of(lengths, self.index.device) for lengths in found)

    @cached_property
    def places(self) -> Tensor:
        """The token of each place of the padded batch, (S, width); 0 for padding."""
        found = np.zeros((len(self.lengths), self.width), np.int64)
        for row, tokens in zip(found, self.of_sequences, strict=True):
            row[: len(tokens)] = tokens
        return torch.from_numpy(found).to(self.index.device)

    @property
    def of_sequences(self) -> Sequence[np.ndarray]:
        """The tokens of each sequence."""
        if self.tree is not None:
            return self.tree.of_sequences
        return [np.arange(n) + start for start, n in zip(self.starts, self.lengths, strict=True)]

    def pack(self, x: Tensor) -> Tensor:
        """(S, width, ...) to (1, T, ...)."""
        return gather_rows(x.flatten(0, 1), self.index).unsqueeze(0)

    def by_sequence(self, x: Tensor) -> list[Tensor]:
        """(1, T, ...) to the tokens of each sequence, (n, ...)."""
        if self.tree is None:
            return list(x[0].split(self.lengths))
        return [x[0].index_select(0, torch.from_numpy(of).to(x.device)) for of in self.of_sequences]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The way back: (1, T, ...)."""
        joined = torch.cat(list(parts))
        if self.tree is not None:
            starts = np.cumsum((0, *self.lengths))
            joined = joined[torch.from_numpy(starts[self.tree.rows] + self.tree.positions).to(joined.device)]
        return joined.unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """(1, T, ...) to (S, width, ...), with zeros where the padding was."""
        S, tokens, index = len(self.lengths), x[0], self.index
        if self.tree is not None:
            tokens = repeat_rows(tokens, torch.from_numpy(np.concatenate(self.of_sequences)).to(index.device))
            index = Layout.of(self.lengths, self.width, index.device).index
        return spread_rows(tokens, index, S * self.width).unflatten(0, (S, self.width))


def neighbours(lengths: Sequence[int], kind: str) -> list[list[int]]:
    """The numbers of neighbours of about the same length, which attention computes in one call.

    Args:
        kind: As of `kind_of`.
    """
    found: list[list[int]] = []
    most_waste = BUCKET_WASTE["cuda" if kind == "cuda" else "cpu"]
    longest = shortest = wasted = 0  # of the last bucket
    for i, n in enumerate(lengths):
        if found and (
            min(shortest, n) >= BUCKET_RATIO * max(longest, n)
            or (n <= longest and wasted + longest**2 - n**2 <= most_waste)
        ):
            wasted += len(found[-1]) * max(n**2 - longest**2, 0) + max(longest**2 - n**2, 0)
            longest, shortest = max(longest, n), min(shortest, n)
            found[-1].append(i)
        else:
            longest, shortest, wasted = n, n, 0
            found.append([i])
    return found


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
        return spread_rows(dy, index, ctx.rows), None


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
        return gather_rows(dy, index), None, None


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    return _Gather.apply(x, index)


def spread_rows(x: Tensor, index: Tensor, rows: int) -> Tensor:
    return _Spread.apply(x, index, rows)


class _Repeat(_Gather):
    """Some rows of x, several times. The gradients of a row add up in the same order each time, on CUDA, too."""

    @staticmethod
    def backward(ctx: RowsContext, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        (index,) = ctx.saved_tensors
        exact = torch.promote_types(dy.dtype, torch.float32)  # many may add up
        found = dy.new_zeros(ctx.rows, *dy.shape[1:], dtype=exact)
        if dy.device.type == "cuda":  # sorts, where index_add_ adds in any order
            found.index_put_((index,), dy.to(exact), accumulate=True)
        else:
            found.index_add_(0, index, dy.to(exact))
        return found.to(dy.dtype), None


def repeat_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x, (N, ...), any of them several times."""
    return _Repeat.apply(x, index)
