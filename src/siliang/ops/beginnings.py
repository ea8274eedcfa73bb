"""Sequences that begin with the same tokens, as a prefix tree: shared tokens are stored once.

    a b c d e          a b --- c d e
    a b f         =>      \\-- f
    g h                g h

In a causal model the state of a token depends on the tokens before it alone. So the states of a shared beginning are
the same in all of its sequences, and the model computes them once (`ops/tree_attention.py`).

Shapes: S sequences, W columns of the padded batch, T tokens of all spans, V virtual tokens in front of each sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

LEAST_SAVED = 16  # tokens that a span has to save: each span costs one more attention call (docs/log.md)
LEAST_SHARE = 0.1  # of all tokens: what a tree has to save; it costs 6% of a step in bf16 (docs/log.md)


@dataclass(frozen=True)
class TreeSpan:
    """Tokens that the same sequences go through.

    Attributes:
        start: The position of its first token in its sequences.
        length: Its tokens, at least one.
        parent: The number of the span that it continues; -1 where a sequence begins.
        end: The number of the first span behind it that is not below it.
        row: A sequence that goes through it.
    """

    start: int
    length: int
    parent: int
    end: int
    row: int


@dataclass(frozen=True)
class Beginnings:
    """The tree of some sequences. Spans come before those below them, which follow one another.

    Attributes:
        leaves: The last span of each sequence.
    """

    spans: tuple[TreeSpan, ...]
    leaves: tuple[int, ...]

    @classmethod
    def apart(cls, lengths: Sequence[int]) -> Beginnings:
        """Of sequences that share nothing."""
        spans = tuple(TreeSpan(0, n, -1, i + 1, i) for i, n in enumerate(lengths))
        return cls(spans, tuple(range(len(lengths))))

    @cached_property
    def tokens(self) -> int:
        """T."""
        return sum(span.length for span in self.spans)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each span begins among the T tokens, and T."""
        return tuple(accumulate((span.length for span in self.spans), initial=0))

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """The spans from the beginning of a sequence to each span, itself included."""
        found: list[tuple[int, ...]] = []
        for number, span in enumerate(self.spans):
            found.append((*found[span.parent], number) if span.parent >= 0 else (number,))
        return tuple(found)

    def tokens_to(self, span: int) -> np.ndarray:
        """The tokens from the beginning of a sequence to the end of a span."""
        parts = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in self.paths[span]]
        return np.concatenate(parts)

    @cached_property
    def of_sequences(self) -> tuple[np.ndarray, ...]:
        """The tokens of each sequence."""
        return tuple(self.tokens_to(leaf) for leaf in self.leaves)

    @cached_property
    def positions(self) -> np.ndarray:
        """The position of each token in its sequences, (T,)."""
        return np.concatenate([np.arange(s.start, s.start + s.length) for s in self.spans])

    @cached_property
    def rows(self) -> np.ndarray:
        """A sequence that each token is of, (T,)."""
        return np.repeat([span.row for span in self.spans], [span.length for span in self.spans])

    def behind(self, virtual: int) -> Beginnings:
        """The tree with so many tokens in front of each sequence, which are the same for all."""
        if not virtual:
            return self
        tops = [i for i, span in enumerate(self.spans) if span.parent < 0]
        if len(tops) > 1 and virtual * (len(tops) - 1) >= LEAST_SAVED:
            moved = (replace(s, start=s.start + virtual, parent=s.parent + 1, end=s.end + 1) for s in self.spans)
            top = TreeSpan(0, virtual, -1, len(self.spans) + 1, self.spans[0].row)
            return Beginnings((top, *moved), tuple(leaf + 1 for leaf in self.leaves))
        spans = (
            replace(s, length=s.length + virtual) if s.parent < 0 else replace(s, start=s.start + virtual)
            for s in self.spans
        )
        return Beginnings(tuple(spans), self.leaves)

    def saves(self, tokens: int, least: int = LEAST_SAVED) -> bool:
        """Whether it saves enough of so many tokens."""
        return tokens - self.tokens >= max(least, LEAST_SHARE * tokens)


def find_beginnings(sequences: Sequence[bytes], size: int, least: int = LEAST_SAVED) -> Beginnings | None:
    """The tree of sequences; None if they share too little.

    Args:
        sequences: The tokens of each, `size` bytes a token, at least one.
        least: Tokens that a shared span has to save.
    """
    if len(sequences) < 2:
        return None
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    ordered = [sequences[i] for i in order]
    common = [0, *(common_tokens(a, b, size) for a, b in pairwise(ordered))]
    if sum(common) < least:
        return None
    lengths = [len(s) // size for s in ordered]
    tops: list[tuple[int, int, int, int]] = []  # start, length, parent and row of each span
    leaves = [-1] * len(order)
    waiting = [(_branches(lengths, common), 0, -1)]  # a branch, the tokens in spans above it, the last of these
    while waiting:
        branch, depth, parent = waiting.pop()
        own, others = branch.depth - depth, branch.last - branch.first - 1
        if own and (not others or own * others >= least):
            tops.append((depth, own, parent, order[branch.first]))
            parent, depth = len(tops) - 1, branch.depth
        for i in branch.whole:
            if branch.depth > depth:
                tops.append((depth, branch.depth - depth, parent, order[i]))
            leaves[order[i]] = len(tops) - 1 if branch.depth > depth else parent
        waiting += [(below, depth, parent) for below in reversed(branch.below)]
    ends = list(range(1, len(tops) + 1))
    for i in range(len(tops) - 1, -1, -1):
        if (parent := tops[i][2]) >= 0:
            ends[parent] = max(ends[parent], ends[i])
    spans = (TreeSpan(*top[:3], end, top[3]) for top, end in zip(tops, ends, strict=True))
    found = Beginnings(tuple(spans), tuple(leaves))
    return found if found.saves(sum(lengths), least) else None


@dataclass(slots=True)
class _Branch:
    """Neighbours of sorted sequences that begin with the same tokens.

    Attributes:
        depth: How many tokens these are.
        first: The first of the sequences.
        last: The one behind the last.
        whole: Those that end there.
        below: Branches of those that continue.
    """

    depth: int
    first: int
    last: int = 0
    whole: list[int] = field(default_factory=list[int])
    below: list[_Branch] = field(default_factory=list["_Branch"])


def _branches(lengths: Sequence[int], common: Sequence[int]) -> _Branch:
    """The branch of all sorted sequences, in one pass: the time does not grow with the depth.

    Args:
        lengths: The tokens of each.
        common: Those that it has in common with the one before it.
    """
    path = [_Branch(0, 0)]  # of the sequence before
    for i, (length, shared) in enumerate(zip(lengths, common, strict=True)):
        left = None
        while path[-1].depth > shared:
            left = path.pop()
            left.last = i
        if left is not None and path[-1].depth < shared:
            path[-1].below[-1] = _Branch(shared, left.first, below=[left])
            path.append(path[-1].below[-1])
        if length > shared:
            path[-1].below.append(_Branch(length, i))
            path.append(path[-1].below[-1])
        path[-1].whole.append(i)
    for branch in path:
        branch.last = len(lengths)
    return path[0]


def common_tokens(a: bytes, b: bytes, size: int) -> int:
    """The tokens with which both begin."""
    n = min(len(a), len(b))
    if a[:size] != b[:size]:
        return 0
    x, y = np.frombuffer(a, np.uint8, n), np.frombuffer(b, np.uint8, n)
    differing = x != y
    at = int(differing.argmax()) if differing.any() else n
    return at // size
