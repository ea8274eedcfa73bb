"""Rows that go through the model at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from siliang.data.encode import IGNORED


@dataclass
class Batch:
    """Rows that go through the model at once.

    Attributes:
        inputs: What the model takes, padded on the right.
        lengths: Tokens of each row.
        weight: What the loss is divided by: labelled tokens, or rows.
        keys: What tells each row from others, by its content.
        targets: For a model that writes, each labelled token's number, and the row and column of the state that
            predicts it, (3, N).
        entries: The rows' numbers in their data set, where these were given; empty for a dummy batch.
        by_token: The weight is of labelled tokens, of which `inputs` has a row for each row; otherwise of rows.
    """

    inputs: dict[str, Tensor]
    lengths: tuple[int, ...]
    weight: int
    keys: tuple[bytes, ...]
    targets: Tensor | None = None
    entries: tuple[int, ...] = ()
    by_token: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(self.lengths)

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

    def dummy(self) -> Batch:
        """The same rows with zero weight. A rank without rows runs this batch so that collectives match."""
        return replace(self, weight=0, targets=None if self.targets is None else self.targets[:, :0], entries=())

    def halves(self) -> list[Batch]:
        """The same rows in two batches; of a single row, the batch itself."""
        n = len(self.lengths)
        return [self._part(0, n // 2), self._part(n // 2, n)] if n > 1 else [self]

    def _part(self, start: int, stop: int) -> Batch:
        inputs = {name: t[start:stop] for name, t in self.inputs.items()}
        lengths, keys, targets = self.lengths[start:stop], self.keys[start:stop], self.targets
        entries = self.entries[start:stop]
        if targets is not None:
            targets = targets[:, (targets[1] >= start) & (targets[1] < stop)].clone()
            targets[1] -= start
            return Batch(inputs, lengths, targets.shape[1], keys, targets, entries)
        weight = int((inputs["labels"] != IGNORED).sum()) if self.by_token else stop - start
        return Batch(inputs, lengths, weight, keys, entries=entries, by_token=self.by_token)
