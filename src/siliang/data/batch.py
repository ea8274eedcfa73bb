"""Rows that go through the model at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from siliang.data.encode import IGNORED
from siliang.ops.beginnings import LEAST_SAVED, Beginnings, find_beginnings


@dataclass
class Batch:
    """Entries of a data set that go through the model at once: one sequence each, or several.

    Attributes:
        inputs: What the model takes, padded on the right; a row a sequence.
        lengths: Tokens of each sequence.
        weight: What the loss is divided by: labelled tokens, or entries.
        keys: A key of each sequence, from its content.
        targets: For a model that writes, each labelled token's number, and the row and column of the state that
            predicts it, (3, N).
        entries: The entries' numbers in their data set, where these were given; empty for a dummy batch.
        by_token: The weight is of labelled tokens; otherwise of entries.
        sizes: Sequences of each entry; empty where each is one.
        tree: The tree of the sequences, if they share their beginnings.
        labelled: For a model that writes, the number of each sequence's targets.
    """

    inputs: dict[str, Tensor]
    lengths: tuple[int, ...]
    weight: int
    keys: tuple[bytes, ...]
    targets: Tensor | None = None
    entries: tuple[int, ...] = ()
    by_token: bool = False
    sizes: tuple[int, ...] = ()
    tree: Beginnings | None = None
    labelled: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.sizes or self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(self.lengths)

    @property
    def distinct_tokens(self) -> int:
        """The same, those of shared beginnings once."""
        return self.tokens if self.tree is None else self.tree.tokens

    @property
    def width(self) -> int:
        """Columns of the padded batch."""
        return self.inputs["input_ids"].shape[1]

    def to(self, device: torch.device) -> Batch:
        """The same, there."""
        if device.type == "cpu":
            return self
        inputs = {k: v.to(device, non_blocking=True) for k, v in self.inputs.items()}
        targets = None if self.targets is None else self.targets.to(device, non_blocking=True)
        return replace(self, inputs=inputs, targets=targets)

    @property
    def is_dummy(self) -> bool:
        """Whether it adds nothing to the loss."""
        return self.weight == 0

    def dummy(self) -> Batch:
        """The same rows with zero weight. A rank without rows runs this batch so that collectives match."""
        targets = None if self.targets is None else self.targets[:, :0]
        return replace(self, weight=0, targets=targets, entries=(), labelled=(0,) * len(self.labelled))

    def halves(self) -> list[Batch]:
        """The same entries in two batches; of a single one, the batch itself."""
        n = len(self)
        return [self._part(0, n // 2), self._part(n // 2, n)] if n > 1 else [self]

    def _part(self, first: int, last: int) -> Batch:
        """The entries from `first` up to `last`."""
        ends = [0, *accumulate(self.sizes or [1] * len(self.lengths))]
        start, stop = ends[first], ends[last]
        inputs = {name: t[start:stop] for name, t in self.inputs.items()}
        targets, weight = self.targets, last - first
        if targets is not None:
            targets = targets[:, (targets[1] >= start) & (targets[1] < stop)].clone()
            targets[1] -= start
        if self.by_token:
            weight = int((inputs["labels"] != IGNORED).sum()) if targets is None else targets.shape[1]
        return replace(
            self,
            inputs=inputs,
            lengths=self.lengths[start:stop],
            weight=weight,
            keys=self.keys[start:stop],
            targets=targets,
            entries=self.entries[first:last],
            sizes=self.sizes[first:last],
            tree=None if self.tree is None else tree_of(inputs, self.lengths[start:stop]),
            labelled=self.labelled[start:stop],
        )


def tree_of(inputs: Mapping[str, Tensor], lengths: Sequence[int], least: int = LEAST_SAVED) -> Beginnings | None:
    """The tree of a padded batch's sequences; None if they share too little.

    Args:
        inputs: input_ids and, where the model reads them, token_type_ids, each (S, W).
        least: As of `find_beginnings`.
    """
    columns = [inputs[name].numpy() for name in ("input_ids", "token_type_ids") if name in inputs]
    read = np.stack(columns, -1).astype(np.int32)
    return find_beginnings([row[:n].tobytes() for row, n in zip(read, lengths, strict=True)], read[0, 0].nbytes, least)
