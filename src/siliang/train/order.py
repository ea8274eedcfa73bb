"""The order in which the rows of an epoch are trained on: random, or rows of like length side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from siliang.config import RunConfig
from siliang.types import TaskType


class Order(Sampler[int]):
    """Row numbers of an epoch, the same for the same seed and epoch.

    Random order is that of transformers' Trainer with this seed.

    Args:
        lengths: Tokens of each row.
        step: Rows of an optimiser step.
        by_length: A step's rows are of like length: a batch that is padded then has little padding, and one that is
            packed has attention in few sizes. Steps stay in random order, but the longest comes first: what does not
            fit shows at once.
    """

    def __init__(self, lengths: Sequence[int], *, step: int, seed: int, by_length: bool) -> None:
        self._lengths, self._step, self._seed, self._by_length = lengths, step, seed, by_length
        self._random = SeedableRandomSampler(range(len(lengths)), data_seed=seed)  # type: ignore[arg-type]
        self._epoch = 0

    @classmethod
    def of(cls, config: RunConfig, lengths: Sequence[int]) -> Order:
        """As the config asks for it."""
        t = config.train
        by_length = config.task is not TaskType.CAUSAL_LM if t.group_by_length is None else t.group_by_length
        return cls(lengths, step=t.batch_size * t.gradient_accumulation, seed=t.seed, by_length=by_length)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next; accelerate says so."""
        self._epoch = epoch
        self._random.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        if not self._by_length:
            yield from self._random
            return
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        rows = get_length_grouped_indices(self._lengths, self._step, generator=generator)
        first, *steps = [rows[i : i + self._step] for i in range(0, len(rows), self._step)]
        last = steps.pop() if steps and len(steps[-1]) < self._step else []  # a short step is an epoch's last
        shuffled = (steps[i] for i in torch.randperm(len(steps), generator=generator).tolist())
        yield from chain(first, *shuffled, last)
