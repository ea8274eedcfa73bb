"""The values of sequences by the base model, each computed once: they do not depend on what is learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from siliang.data.batch import Batch
from siliang.language import Bilingual
from siliang.types import DataError

KEY_BYTES = 16  # of a sequence, see `Batch.keys`
MOST_KEPT = 500_000  # sequences whose values are kept where they can be computed again: some 100 MB


class ReferenceStore:
    """The values of sequences without the adapter.

    A checkpoint holds them, since a value that is computed in another batch may differ in its last bits.

    Args:
        only_before: They can be computed before the first step alone: full tuning has no adapter to switch off.
    """

    def __init__(self, *, only_before: bool = False) -> None:
        self.only_before = only_before
        self._kept: dict[bytes, tuple[float, ...]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, batch: Batch) -> Tensor | None:
        """The values of each sequence of the batch, (S, K); None where one of them is not there.

        Raises:
            DataError: One is not there, and cannot be computed.
        """
        found = [self._kept.get(key) for key in batch.keys]
        if None not in found:
            return torch.tensor(found, device=batch.inputs["input_ids"].device)
        if self.only_before:
            raise DataError(
                Bilingual(
                    "the base model's log-probabilities of a row are missing: full tuning takes them before its first "
                    "step, and the rows have changed since.\nRestore the data, or start a new run.",
                    "缺少基座模型对某条样本的对数概率：全参微调在第一步之前计算它们，而样本在此之后变了。"
                    "\n请恢复原来的数据，或重新开始一次运行。",
                )
            )
        return None

    def add(self, batch: Batch, values: Tensor) -> None:
        """Keeps the values of a batch, (S, K).

        Raises:
            ValueError: The batch is a dummy, which has the keys of real rows and none of their targets.
        """
        if batch.is_dummy:
            raise ValueError("a dummy batch has no values to keep")
        if self.only_before or len(self._kept) < MOST_KEPT:
            self._kept |= dict(zip(batch.keys, map(tuple, values.tolist()), strict=True))

    def merge(self, states: Iterable[Mapping[str, Tensor]]) -> None:
        """Takes the values of several ranks; of equal sequences, those of the last."""
        for state in states:
            keys, values = state["keys"].numpy(), state["values"].tolist()
            self._kept |= {key.tobytes(): tuple(row) for key, row in zip(keys, values, strict=True)}

    def state_dict(self) -> dict[str, Tensor]:
        """The keys, (N, 16), and the values, (N, K)."""
        keys = torch.tensor([list(key) for key in self._kept], dtype=torch.uint8)
        return {"keys": keys.view(len(self._kept), KEY_BYTES), "values": torch.tensor([*self._kept.values()])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The counterpart of `state_dict`."""
        self._kept = {}
        self.merge([state])
