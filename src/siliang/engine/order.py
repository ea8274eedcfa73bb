"""The order of the rows of an epoch, random or with rows that are alike together, and each rank's share of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from siliang.config import RunConfig
from siliang.data.batch import Batch
from siliang.data.design_effect import harmful_effect
from siliang.data.row_beginnings import RowBeginnings, row_beginnings
from siliang.data.tokens import TokenSet
from siliang.engine.batches import MOST_COMPARED, StepCollator, in_steps
from siliang.tasks import TASKS

SPREAD = 0.1  # lengths are changed at random by up to this share: rows of like length change places from epoch to epoch


class Order(Sampler[int]):
    """Row numbers of an epoch, the same for the same seed and epoch.

    Random order is that of transformers' Trainer with this seed. Otherwise, each step has rows that are alike, and
    steps are in random order, except that the heaviest comes first: a lack of memory then shows at once.

    Args:
        lengths: Tokens of each row.
        step: Rows of an optimizer step.
        by_length: Give each step rows of similar length: padded batches then have little padding, and packed batches
            few attention sizes.
        beginnings: Of the rows: give each step rows that begin alike, if rows have enough in common. With `by_length`,
            those of similar length among them.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        step: int,
        seed: int,
        by_length: bool,
        beginnings: RowBeginnings | None = None,
    ) -> None:
        self.step = step
        self._lengths, self._seed, self._by_length = np.asarray(lengths, np.int64), seed, by_length
        self._beginnings = beginnings if beginnings is not None and beginnings.worth else None
        self._random = SeedableRandomSampler(range(len(lengths)), data_seed=seed)
        self._epoch = 0

    @classmethod
    def of(cls, config: RunConfig, tokens: TokenSet, *, by_beginnings: bool = True) -> Order:
        """The order of a run's rows.

        Args:
            by_beginnings: As the settings say; otherwise, never.
        """
        t = config.train
        by_length = groups_by_length(config, tokens)
        beginnings = row_beginnings(tokens) if t.group_by_beginnings and by_beginnings else None
        lengths = tokens.lengths.tolist()
        return cls(lengths, step=t.rows_per_step, seed=t.seed, by_length=by_length, beginnings=beginnings)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next order."""
        self._epoch = epoch
        self._random.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        if not self._by_length and self._beginnings is None:
            yield from self._random
            return
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        first, *steps = self._alike(generator)
        last = steps.pop() if steps and len(steps[-1]) < self.step else []  # only the last step may be short
        shuffled = (steps[i] for i in torch.randperm(len(steps), generator=generator).tolist())
        yield from chain(first, *shuffled, last)

    def _alike(self, generator: torch.Generator) -> list[Sequence[int]]:
        """Steps of rows that are alike; the heaviest is the first, and a short one the last."""
        if self._beginnings is None:
            rows = get_length_grouped_indices(self._lengths.tolist(), self.step, generator=generator)
            return in_steps(rows, self.step)
        salt = int(torch.randint(2**63 - 1, (), generator=generator))
        tiebreak = torch.rand(len(self), generator=generator, dtype=torch.float64).numpy()
        if self._by_length:
            tiebreak = self._lengths / self._lengths.max() * (1 - SPREAD * (1 - tiebreak))
        steps = in_steps(self._beginnings.shuffled(salt, tiebreak), self.step)
        whole = steps[: len(self) // self.step] or steps
        # by the tokens of shared beginnings also where a run computes them apart: no order depends on that
        heaviest = int(self._beginnings.computed(whole).argmax())
        steps[0], steps[heaviest] = steps[heaviest], steps[0]
        return steps


def groups_by_length(config: RunConfig, tokens: TokenSet) -> bool:
    """Whether each step has rows of similar length: train.group_by_length, or, where that is None, whether it changes
    only the time.

    A mean over tokens would weigh the tokens of short rows more. Where the labels depend on the length, the rows of a
    step would have nearly the same labels, and less would be learned.
    """
    if (wanted := config.train.group_by_length) is not None:
        return wanted
    return TASKS[config.task].counts_rows and harmful_effect(tokens, config.train.rows_per_step) is None


def by_beginnings(tokens: TokenSet) -> Sequence[int]:
    """The numbers of all entries: those whose first sequences begin alike follow one another. In order where they share
    little, or are many."""
    if not 2 < len(tokens) <= MOST_COMPARED:
        return range(len(tokens))
    found = row_beginnings(tokens)
    return found.order.tolist() if found.worth else range(len(tokens))


def evaluation_batches(
    tokens: TokenSet,
    collator: StepCollator,
    *,
    ranks: int = 1,
    rank: int = 0,
    step: int = 1,
    as_many: Callable[[list[Batch]], list[Batch]] = list,
) -> Iterator[Batch]:
    """The batches of all entries: the same in every evaluation of a run. Those that begin alike are together, if
    beginnings are shared.

    Args:
        ranks: They share the entries of each step, and these are the batches of one of them, `rank`.
        step: Entries of an optimizer step.
        as_many: Adds dummy batches to those of a step, if every rank needs the same number.
    """
    order = by_beginnings(tokens) if collator.shares.evaluation else range(len(tokens))
    if ranks == 1:
        parts: Iterable[Sequence[int]] = in_steps(order, collator.rows_at_once)
    else:
        parts = (of_ranks[rank] for of_ranks in shared_steps(order, tokens.lengths.tolist(), step, ranks))
    for part in parts:
        yield from as_many(collator.numbered(tokens, part))


def shares(lengths: Sequence[int], rows: Sequence[int], ranks: int) -> list[list[int]]:
    """Distributes the rows of a step over ranks with about equal numbers of tokens: the longest row first, each row to
    the rank with the fewest tokens so far."""
    found: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for row in sorted(rows, key=lambda i: (-lengths[i], i)):
        least = tokens.index(min(tokens))
        found[least].append(row)
        tokens[least] += lengths[row]
    return found


def shared_steps(rows: Iterable[int], lengths: Sequence[int], step: int, ranks: int) -> Iterator[list[list[int]]]:
    """The rows of each step by rank. Every rank computes the rows of all ranks, so no communication is needed.

    Args:
        rows: The rows in the order of training.
        lengths: Tokens of each row.
        step: Rows per step.

    Yields:
        One list per rank. A rank without a row in this step gets a dummy row: ~row instead of row.
    """
    for together in in_steps(list(rows), step):
        if ranks == 1:
            yield [list(together)]
        else:
            yield [own or [~together[0]] for own in shares(lengths, together, ranks)]


class WithDummies(Dataset[dict[str, object]]):
    """A dataset with dummy rows: index ~row is the dummy of row, which adds nothing to the loss."""

    def __init__(self, rows: TokenSet) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, object]:
        return self.__getitems__([i])[0]

    def __getitems__(self, numbers: list[int]) -> list[dict[str, object]]:
        found = self._rows.__getitems__([i if i >= 0 else ~i for i in numbers])
        return [{**row, "dummy": True} if i < 0 else row for i, row in zip(numbers, found, strict=True)]
