"""Rows to one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from siliang.data.encode import IGNORED


@dataclass
class PadCollator:
    """Rows to one batch, each column padded on the right to its longest.

    Attributes:
        pad_token_id: What fills the gaps. Its labels and attention are off by position, so any token will do: one that
            is also the end of sequence still has its label where it ends an answer.
        multiple: Lengths are rounded up to a multiple of this.
    """

    pad_token_id: int
    multiple: int = 1

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch: input_ids and attention_mask, each (rows, length); labels (rows, length of the longest labels), or
        (rows,) for classes; start_positions and end_positions (rows,) for spans.
        """
        batch: dict[str, Tensor] = {}
        for name, value in rows[0].items():
            values = [row[name] for row in rows]
            if not isinstance(value, list):
                batch[name] = torch.tensor(values)
                continue
            filler = self.pad_token_id if name == "input_ids" else IGNORED if name == "labels" else 0
            batch[name] = self._padded(values, filler)
            if name == "input_ids":
                batch["attention_mask"] = self._padded([[1] * len(v) for v in values], 0)
        return batch

    def _padded(self, values: list[list[int]], filler: int) -> Tensor:
        length = -(-max(map(len, values)) // self.multiple) * self.multiple
        return torch.tensor([v + [filler] * (length - len(v)) for v in values])
