"""The rows of one optimizer step as the batches that go through the model one after the other.

A step has a fixed number of rows. Splitting them into batches changes the cost and not the result: the losses are
summed, and divided by the labelled tokens (or rows) of the whole step. It does change the result of the few methods
that take a mean over a batch (`Method.mixes_rows`: LILY, VeLoRA); the engine says so.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypedDict

import numpy as np
import torch

from siliang.data.batch import Batch
from siliang.data.collate import PadCollator
from siliang.data.encode import IGNORED
from siliang.data.tokens import TokenSet
from siliang.ops.beginnings import Beginnings, find_beginnings
from siliang.tasks import Task

PADDED_SPLIT_TOKENS = 512  # a batch that cannot be packed is not split below: overhead would eat the gain
PADDED_SPLIT_WASTE = 0.8  # and is split where the next row is shorter than this share of its longest
MOST_COMPARED = 50_000  # above this number, duplicate sequences are not looked for: it takes a second
COMPARED_AT_ONCE = 1024
CPU_TOKEN_BYTES = 8192  # most tokens of a batch on a CPU, times the bytes of a number


def in_steps(rows: Sequence[int], step: int) -> list[Sequence[int]]:
    """The rows of each step of an epoch; the last step may have fewer."""
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def most_tokens(limit: int | None, device_type: str, dtype: torch.dtype) -> int | None:
    """The maximum number of tokens of a batch, with a default on a CPU.

    glibc requests blocks above 32 MB from the system each time, zeroed page by page: two batches of 4,096 tokens take
    a tenth less time than one of 8,192 in bf16 (docs/log.md), and half the memory.

    Args:
        device_type: As of `torch.device.type`.
        dtype: Of the computation.
    """
    return limit or (CPU_TOKEN_BYTES // dtype.itemsize if device_type == "cpu" else None)


class StepBatches(TypedDict):
    """The batches of a step, and the numbers of its rows; a step of a dummy row has none."""

    batches: list[Batch]
    rows: list[int]


@dataclass(frozen=True)
class Sharing:
    """Where beginnings that sequences share are computed once."""

    training: bool = False
    evaluation: bool = False


SEPARATE, EVERYWHERE = Sharing(), Sharing(training=True, evaluation=True)


@dataclass
class StepCollator:
    """Makes the batches of a step's rows.

    Attributes:
        rows_at_once: The maximum number of rows of a batch. The sequences of a row stay together.
        tokens_at_once: The maximum number of tokens of a batch, padding included; None for no limit. A longer row is
            a separate batch.
        packed: The batches are run without padding.
        shares: Whether shared beginnings are computed once.
    """

    pad: PadCollator
    task: Task
    rows_at_once: int
    tokens_at_once: int | None = None
    packed: bool = True
    shares: Sharing = SEPARATE

    def __call__(self, rows: list[dict[str, Any]]) -> StepBatches:
        numbers = [row.pop("row", -1) for row in rows]
        dummies = [row.pop("dummy", False) for row in rows]
        batches = self._batches(rows, share=self.shares.training)
        if any(dummies):  # a rank without rows has only this dummy
            return {"batches": [batch.dummy() for batch in batches], "rows": []}
        return {"batches": batches, "rows": numbers}

    def numbered(self, tokens: TokenSet, entries: Sequence[int]) -> list[Batch]:
        """The batches of these entries of a token set; each batch knows the numbers of its rows.

        Args:
            entries: Their numbers; ~i marks a dummy entry; it adds nothing.
        """
        rows = tokens.__getitems__([i if i >= 0 else ~i for i in entries])
        for i, row in zip(entries, rows, strict=True):
            row["entry"] = i
            row.pop("row", None)
        batches = self._batches(rows, share=self.shares.evaluation) if rows else []
        return [batch.dummy() if min(batch.entries) < 0 else batch for batch in batches]

    def narrow_to(self, batches: list[Batch]) -> None:
        """Limits later batches to the size of the largest of these."""
        self.rows_at_once = min(self.rows_at_once, max(map(len, batches)))
        tokens = max(map(self.cost, batches))
        self.tokens_at_once = min(self.tokens_at_once or tokens, tokens)

    def cost(self, batch: Batch) -> int:
        """The tokens that a batch computes, padding included, and shared beginnings once."""
        return self.cost_of(batch.lengths) if batch.tree is None else batch.distinct_tokens

    def cost_of(self, lengths: Sequence[int]) -> int:
        """The same for sequences of these lengths that share nothing."""
        return sum(lengths) if self.packed else max(lengths) * len(lengths)

    def split(self, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Splits the rows of a training step into batches.

        Args:
            rows: Where beginnings are shared, with their tokens; otherwise their lengths suffice.
        """
        return [part for part, _ in self._parts(rows, share=self.shares.training)]

    def _batches(self, rows: list[dict[str, Any]], *, share: bool) -> list[Batch]:
        return [self._batch(part, tree) for part, tree in self._parts(rows, share=share)]

    def _parts(
        self, rows: list[dict[str, Any]], *, share: bool
    ) -> list[tuple[list[dict[str, Any]], Beginnings | None]]:
        """The rows of each batch, with their tree."""
        if not share or not self.packed:
            return [(part, None) for part in self._split(rows)]
        tokens = [token_bytes(row) for row in rows]
        tree = _tree(tokens, token_size(rows[0]))
        return [(part, None) for part in self._split(rows)] if tree is None else self._split_tree(rows, tokens, tree)

    def _split(self, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        # the longest rows first: a lack of memory shows at once, and rows of similar length are together
        rows = sorted(rows, key=lambda row: -len(row["input_ids"]))
        parts: list[list[dict[str, Any]]] = [[]]
        tokens = sequences = longest = 0  # of the current batch
        for row in rows:
            own = lengths_of(row)
            n = max(own)
            cost = tokens + sum(own) if self.packed else max(longest, n) * (sequences + len(own))
            too_many = self.tokens_at_once is not None and cost > self.tokens_at_once
            wasteful = not self.packed and n < PADDED_SPLIT_WASTE * longest and tokens >= PADDED_SPLIT_TOKENS
            if parts[-1] and (len(parts[-1]) == self.rows_at_once or too_many or wasteful):
                parts.append([])
                tokens = sequences = longest = 0
            parts[-1].append(row)
            tokens, sequences, longest = tokens + sum(own), sequences + len(own), max(longest, n)
        return parts

    def _split_tree(
        self, rows: list[dict[str, Any]], tokens: list[list[bytes]], tree: Beginnings
    ) -> list[tuple[list[dict[str, Any]], Beginnings | None]]:
        """Rows that share their beginning follow one another.

        Args:
            tokens: What the model reads of each sequence of each row.
            tree: Of all rows.
        """
        ends = list(accumulate(map(len, tokens), initial=0))
        leaves = [tree.leaves[a:b] for a, b in pairwise(ends)]  # of the sequences of each row
        tops = [tree.paths[own[0]][0] for own in leaves]
        longest = dict.fromkeys(tops, 0)
        for top, row in zip(tops, rows, strict=True):
            longest[top] = max(longest[top], len(row["input_ids"]))
        waiting = deque(sorted(range(len(rows)), key=lambda i: (-longest[tops[i]], leaves[i])))
        most = self.tokens_at_once or math.inf
        parts: list[tuple[list[dict[str, Any]], Beginnings | None]] = []
        while waiting:
            part, there, computed = list[int](), set[int](), 0  # rows, their spans, and the tokens of these
            while waiting and len(part) < self.rows_at_once:
                spans = {span for leaf in leaves[waiting[0]] for span in tree.paths[leaf]} - there
                more = sum(tree.spans[span].length for span in spans)
                if part and computed + more > most:
                    break
                part.append(waiting.popleft())
                there |= spans
                computed += more
            own = _tree([tokens[i] for i in part], token_size(rows[0]))
            # without the rows of other batches a span may save too little, and is left out of the batch's own tree
            while len(part) > 1 and (own.tokens if own else sum(len(rows[i]["input_ids"]) for i in part)) > most:
                waiting.appendleft(part.pop())
                own = _tree([tokens[i] for i in part], token_size(rows[0]))
            parts.append(([rows[i] for i in part], own))
        return parts

    def _batch(self, rows: list[dict[str, Any]], tree: Beginnings | None) -> Batch:
        entries = tuple(row.pop("entry") for row in rows if "entry" in row)
        sizes: tuple[int, ...] = ()
        count = len(rows)
        if self.task.data.sequences:
            sizes = tuple(len(row["sequences"]) for row in rows)
            rows = [sequence for row in rows for sequence in sequences_of(row)]
        takes_labels = self.task.step_loss is not None and self.task.step_loss.reference  # whose values are kept by key
        keys = tuple(_key(row, row["labels"] if takes_labels else ()) for row in rows)
        inputs = self.pad(rows)
        lengths = tuple(len(row["input_ids"]) for row in rows)
        by_token = self.task.data.label_per_token and self.task.step_loss is None
        if self.task.writes:
            # if the labels are the tokens of the row, the state of column j predicts token j + 1
            labels = inputs.pop("labels")[:, 1:] if self.task.data.next_token else inputs["labels"]
            where = (labels != IGNORED).nonzero().T
            targets = torch.stack((labels[tuple(where)], *where))
            weight = targets.shape[1] if by_token else count
            labelled = tuple(torch.bincount(targets[1], minlength=len(rows)).tolist())
            return Batch(inputs, lengths, weight, keys, targets, entries, by_token, sizes, tree, labelled)
        weight = int((inputs["labels"] != IGNORED).sum()) if by_token else count
        return Batch(inputs, lengths, weight, keys, None, entries, by_token, sizes, tree)


def _tree(rows: Sequence[Sequence[bytes]], size: int) -> Beginnings | None:
    """The tree of the sequences of these rows, by what the model reads of them."""
    return find_beginnings([sequence for sequences in rows for sequence in sequences], size)


def token_size(row: Mapping[str, Any]) -> int:
    """The bytes of a token in `token_bytes`."""
    return 8 if "token_type_ids" in row else 4


def token_bytes(row: Mapping[str, Any]) -> list[bytes]:
    """What the model reads of each sequence of a row: its tokens, with their types if it has these."""
    columns = [row[name] for name in ("input_ids", "token_type_ids") if name in row]
    read = np.asarray(columns, dtype=np.int32).T
    ends = list(accumulate(lengths_of(row), initial=0))
    return [read[a:b].tobytes() for a, b in pairwise(ends)]


def lengths_of(row: Mapping[str, Any]) -> list[int]:
    """The tokens of each sequence of a row."""
    return list(row.get("sequences") or [len(row["input_ids"])])


def sequences_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sequences of a row. A sequence gets the values of other columns at its tokens; or its item of a list with one
    item per sequence; or the single value of the row."""
    lengths = row["sequences"]
    total, start = sum(lengths), 0
    found: list[dict[str, Any]] = []
    for number, length in enumerate(lengths):
        own = {}
        for name, value in row.items():
            if name == "sequences":
                continue
            if isinstance(value, list) and len(value) == total:
                own[name] = value[start : start + length]
            else:
                own[name] = value[number] if isinstance(value, list) else value
        found.append(own)
        start += length
    return found


def distinct_tokens(tokens: TokenSet) -> int:
    """The tokens of all distinct sequences, by the keys of batches; with many entries, of all sequences."""
    if len(tokens) > MOST_COMPARED:
        return int(tokens.lengths.sum())
    found: dict[bytes, int] = {}
    for start in range(0, len(tokens), COMPARED_AT_ONCE):
        for row in tokens.__getitems__(list(range(start, min(start + COMPARED_AT_ONCE, len(tokens))))):
            parts = sequences_of(row) if "sequences" in row else [row]
            keys = (_key(part, _token_labels(part) if "sequences" in row else ()) for part in parts)
            found |= {key: len(part["input_ids"]) for key, part in zip(keys, parts, strict=True)}
    return sum(found.values())


def _token_labels(part: Mapping[str, Any]) -> Sequence[int]:
    """The labels of a sequence's tokens; none where it has a single label."""
    labels = part.get("labels", ())
    return labels if isinstance(labels, list) else ()


def _key(row: dict[str, Any], labels: Sequence[int] = ()) -> bytes:
    read = np.asarray([*row["input_ids"], *row.get("token_type_ids", []), *labels], dtype=np.int32)
    return hashlib.blake2b(read.tobytes(), digest_size=16).digest()
