"""The order in which the rows of an epoch are trained, random or grouped by length; and each rank's share of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from siliang.config import RunConfig
from siliang.data.tokens import TokenSet
from siliang.engine.batches import in_steps
from siliang.tasks import TASKS


class Order(Sampler[int]):
    """Row numbers of an epoch, the same for the same seed and epoch.

    Random order is that of transformers' Trainer with this seed.

    Args:
        lengths: Tokens of each row.
        step: Rows of an optimizer step.
        by_length: A step's rows are of like length: a batch that is padded then has little padding, and one that is
            packed has attention in few sizes. Steps stay in random order, but the longest comes first: what does not
            fit shows at once.
    """

    def __init__(self, lengths: Sequence[int], *, step: int, seed: int, by_length: bool) -> None:
        self.step = step
        self._lengths, self._seed, self._by_length = lengths, seed, by_length
        self._random = SeedableRandomSampler(range(len(lengths)), data_seed=seed)
        self._epoch = 0

    @classmethod
    def of(cls, config: RunConfig, lengths: Sequence[int]) -> Order:
        """The order of a run's config."""
        t = config.train
        # where the loss is a mean over tokens, those in a step of short rows would weigh more
        by_length = TASKS[config.task].counts_rows if t.group_by_length is None else t.group_by_length
        return cls(lengths, step=t.rows_per_step, seed=t.seed, by_length=by_length)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch whose order comes next."""
        self._epoch = epoch
        self._random.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        if not self._by_length:
            yield from self._random
            return
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        rows = get_length_grouped_indices(self._lengths, self.step, generator=generator)
        first, *steps = in_steps(rows, self.step)
        last = steps.pop() if steps and len(steps[-1]) < self.step else []  # a short step is an epoch's last
        shuffled = (steps[i] for i in torch.randperm(len(steps), generator=generator).tolist())
        yield from chain(first, *shuffled, last)


def shares(lengths: Sequence[int], rows: Sequence[int], ranks: int) -> list[list[int]]:
    """A step's rows by rank, so that all ranks have about as many tokens: the longest row first, each row to the rank
    with the fewest tokens so far."""
    found: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for row in sorted(rows, key=lambda i: (-lengths[i], i)):
        least = tokens.index(min(tokens))
        found[least].append(row)
        tokens[least] += lengths[row]
    return found


def shared_steps(rows: Iterable[int], lengths: Sequence[int], step: int, ranks: int) -> Iterator[list[list[int]]]:
    """The rows of each step by rank. Every rank knows those of the others, so that nothing is exchanged.

    Args:
        rows: In the order of the training.
        lengths: Tokens of each row.
        step: Rows of a step.

    Yields:
        One list a rank. A rank for which the step has no row gets a dummy row: ~row in place of row.
    """
    for together in in_steps(list(rows), step):
        if ranks == 1:
            yield [list(together)]
        else:
            yield [own or [~together[0]] for own in shares(lengths, together, ranks)]


class WithDummies(Dataset[dict[str, object]]):
    """A data set whose rows may be asked for as ~row, which marks a dummy row: it adds nothing to the loss."""

    def __init__(self, rows: TokenSet) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, object]:
        return self.__getitems__([i])[0]

    def __getitems__(self, numbers: list[int]) -> list[dict[str, object]]:
        found = self._rows.__getitems__([i if i >= 0 else ~i for i in numbers])
        return [{**row, "dummy": True} if i < 0 else row for i, row in zip(numbers, found, strict=True)]
