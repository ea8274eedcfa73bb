"""What the rows of a data set have in common at their beginning, and what it saves to take those together that begin
alike (`train.share_beginnings` computes a common beginning once in a batch).

A row is known by a hash of each of its blocks of 16 tokens: 8 bytes a block, an eighth of the memory of the tokens. Of
a row with several sequences the first one counts. Two blocks with the same hash would change an order, and no result.

Legend: N rows; C shared blocks of all rows: each is in the beginning that its row has in common with another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from siliang.ops.beginnings import LEAST_SAVED, LEAST_SHARE, common_tokens

if TYPE_CHECKING:  # slow to import
    from siliang.data.tokens import TokenSet

BLOCK = LEAST_SAVED  # tokens
HASH = np.dtype(">u8")  # bytes in an order in which they sort as the numbers do
FACTORS = np.random.default_rng(0).integers(2**63, size=BLOCK, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


@dataclass(frozen=True)
class RowBeginnings:
    """The rows of a data set, by their beginnings.

    Attributes:
        lengths: Tokens of each row, (N,); what its own sequences have in common counts once.
        order: The rows so that those that begin alike follow one another, (N,).
        common: Blocks that each of these has in common with the one before it, (N,).
        hashes: Of the blocks with which another row begins, too, (C,), row by row.
        ends: Where those of each row end, (N,).
        copies: How many rows before each are the same, (N,): a source that weighs 3 has its rows three times.
    """

    lengths: np.ndarray
    order: np.ndarray
    common: np.ndarray
    hashes: np.ndarray
    ends: np.ndarray
    copies: np.ndarray

    @classmethod
    def of(cls, tokens: TokenSet) -> RowBeginnings:
        """Those of the entries of a token set."""
        blocks, saved, copies = list[np.ndarray](), list[int](), list[int]()
        seen = Counter[int]()
        for row in _sequences(tokens):
            whole = hash(tuple(ids.tobytes() for ids in row))
            copies.append(seen[whole])
            seen[whole] += 1
            first, *others = (_hashes(ids) for ids in row)
            blocks.append(first)
            saved.append(BLOCK * sum(common_tokens(first.tobytes(), x.tobytes(), HASH.itemsize) for x in others))
        keys = [part.astype(HASH).tobytes() for part in blocks]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        common = np.zeros(len(keys), np.int64)
        common[1:] = [common_tokens(keys[a], keys[b], HASH.itemsize) for a, b in pairwise(order)]
        shared = np.zeros_like(common)
        shared[order] = np.maximum(common, np.append(common[1:], 0))
        return cls(
            lengths=tokens.lengths - np.array(saved, np.int64),
            order=np.array(order, np.int64),
            common=common,
            hashes=np.concatenate([np.zeros(0, np.uint64), *(b[:n] for b, n in zip(blocks, shared, strict=True))]),
            ends=np.cumsum(shared),
            copies=np.array(copies, np.int64),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def worth(self) -> bool:
        """Whether rows have enough in common for an order by it."""
        return BLOCK * int(self.common.sum()) >= max(LEAST_SAVED, LEAST_SHARE * int(self.lengths.sum()))

    @property
    def share(self) -> float:
        """The share of the tokens that are a beginning of several rows."""
        return BLOCK * len(self.hashes) / max(int(self.lengths.sum()), 1)

    def shuffled(self, salt: int, tiebreak: np.ndarray) -> list[int]:
        """The rows in a random order in which those that begin alike follow one another, at every depth. The copies of
        a row are far apart: first comes one of each, then the second ones.

        Args:
            salt: A random number below 2^63: beginnings are in another order for each.
            tiebreak: (N,), from 0 up to 1: the order of rows that begin alike.
        """
        salted = (self.hashes * np.uint64(2 * salt + 1)).astype(HASH).tobytes()
        first, last = (x.astype(HASH).tobytes() for x in (self.copies, tiebreak * 2.0**64))
        size = HASH.itemsize
        keys = [
            first[size * i : size * (i + 1)] + salted[size * start : size * end] + last[size * i : size * (i + 1)]
            for i, (start, end) in enumerate(pairwise([0, *self.ends.tolist()]))
        ]
        return sorted(range(len(keys)), key=keys.__getitem__)

    def computed(self, parts: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """The tokens that each of these parts of the rows computes, (parts,), if what they have in common counts once.

        Args:
            parts: Each of different rows.
        """
        number = np.repeat(np.arange(len(parts)), np.array([len(part) for part in parts], np.int64))
        rows = np.fromiter((row for part in parts for row in part), np.int64)
        tokens = np.bincount(number, self.lengths[rows], minlength=len(parts))
        place = self._places[rows]
        sorting = np.lexsort((place, number))
        number, place = number[sorting], place[sorting]
        pairs = np.flatnonzero(number[1:] == number[:-1])
        common = self._least(place[pairs] + 1, place[pairs + 1] + 1)
        saved = BLOCK * np.bincount(number[pairs], common, minlength=len(parts))
        return (tokens - saved).astype(np.int64)

    def gain(self, step: int, batch: int) -> float:
        """The share of what steps of random rows compute that steps of rows that begin alike save.

        Args:
            step: Rows of a step.
            batch: Rows of a batch; those of a step that begin alike are in one.
        """
        rng = np.random.default_rng(0)
        orders = rng.permutation(len(self)), np.array(self.shuffled(0, rng.random(len(self))), np.int64)
        apart, alike = (float(self.computed(list(self._batches(order, step, batch))).sum()) for order in orders)
        return 1 - alike / max(apart, 1.0)

    def _batches(self, order: np.ndarray, step: int, batch: int) -> Iterator[np.ndarray]:
        for i in range(0, len(order), step):
            rows = order[i : i + step]
            rows = rows[self._places[rows].argsort()]
            yield from (rows[j : j + batch] for j in range(0, len(rows), batch))

    @cached_property
    def _places(self) -> np.ndarray:
        """The place of each row in `order`, (N,)."""
        places = np.empty_like(self.order)
        places[self.order] = np.arange(len(places))
        return places

    @cached_property
    def _minima(self) -> list[np.ndarray]:
        """The least of every 1, 2, 4, ... neighbours in `common`."""
        found = [self.common]
        while (width := 2 ** (len(found) - 1)) * 2 <= len(self.common):
            found.append(np.minimum(found[-1][:-width], found[-1][width:]))
        return found

    def _least(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """The least of `common` from each start up to its end."""
        level = np.frexp(end - start)[1] - 1  # of the largest power of two that is not above the difference
        found = np.zeros_like(start)
        for i, minima in enumerate(self._minima):
            here = np.flatnonzero(level == i)
            found[here] = np.minimum(minima[start[here]], minima[end[here] - 2**i])
        return found


_known = WeakKeyDictionary["TokenSet", RowBeginnings]()


def row_beginnings(tokens: TokenSet) -> RowBeginnings:
    """Those of a token set, which are found once."""
    if tokens not in _known:
        _known[tokens] = RowBeginnings.of(tokens)
    return _known[tokens]


def _sequences(tokens: TokenSet) -> Iterator[list[np.ndarray]]:
    """What the model reads of each entry: a number for each token of its sequences."""
    read = (ids.astype(np.uint64) for ids in tokens.lists("input_ids"))
    if "token_type_ids" in tokens.table.column_names:
        kinds = (kinds.astype(np.uint64) << np.uint64(32) for kinds in tokens.lists("token_type_ids"))
        # of a model that reads no types, the column has no lists
        read = (ids + kind if len(kind) else ids for ids, kind in zip(read, kinds, strict=True))
    if not tokens.spec.sequences:
        yield from ([ids] for ids in read)
        return
    for ids, lengths in zip(read, tokens.lists("sequences"), strict=True):
        yield [ids[a:b] for a, b in pairwise(accumulate(lengths.tolist(), initial=0))]


def _hashes(ids: np.ndarray) -> np.ndarray:
    """The hash of each whole block."""
    blocks = len(ids) // BLOCK
    return ids[: blocks * BLOCK].reshape(blocks, BLOCK) @ FACTORS
