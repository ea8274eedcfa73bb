"""The sequences of a model's trial (trial.py), as a batch of its task.

Shapes: S sequences, W columns of the padded batch, V virtual tokens in front of each sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from siliang.data.batch import Batch
from siliang.data.collate import PadCollator
from siliang.engine.batches import StepCollator
from siliang.ops.stored import is_fake
from siliang.tasks import Task

LENGTHS = (5, 2, 4, 3)  # tokens of the sequences
BEGIN = 2  # tokens that some of them begin with


def vocabulary_of(base: PreTrainedModel) -> int:
    """The number of tokens that the model knows."""
    return getattr(base.config.get_text_config(), "vocab_size", 32)


def sharers(lengths: Sequence[int]) -> list[int]:
    """The sequences that begin with the same tokens: every other of the longer ones."""
    return [i for i, n in enumerate(lengths) if n > BEGIN and i % 2 == 0]


def trial_batch(task: Task, vocabulary: int, padding: int | None) -> Batch:
    """Some short sequences of random tokens, with labels for every other token and each last one if the model writes.

    Args:
        padding: The model's padding token, if it has one.
    """
    pad = padding or 0
    rows = [task.synthetic_row(n, n) for n in LENGTHS]
    (batch,) = StepCollator(PadCollator(pad), task, len(rows))(rows)["batches"]
    ids, lengths = batch.inputs["input_ids"], torch.tensor(batch.lengths)[:, None]
    low = min(5, vocabulary - 1)
    tokens = torch.randint(low, vocabulary, ids.shape, generator=torch.Generator().manual_seed(0))
    for number, i in enumerate(sharers(batch.lengths)):
        tokens[i, :BEGIN] = tokens[0, :BEGIN]
        tokens[i, BEGIN] = low + (tokens[0, BEGIN] - low + number) % (vocabulary - low)  # where they part
    tokens[tokens == pad] = low if low != pad else low - 1
    columns = torch.arange(ids.shape[1])[None]
    tokens[(columns >= lengths) | ((columns == lengths - 1) & (lengths == LENGTHS[0]))] = pad
    ids.copy_(tokens)
    if batch.targets is not None:
        _, sequences, places = batch.targets
        last = torch.stack([places[sequences == i].amax() for i in range(len(batch.lengths))])[sequences] == places
        batch.targets = batch.targets[:, ((sequences + places) % 2 == 0) | last]
        batch.labelled = tuple(torch.bincount(batch.targets[1], minlength=len(batch.lengths)).tolist())
    return batch


def of_tokens(x: Tensor, batch: Batch) -> Tensor:
    """The tokens of (S, V + W, ...) that are neither virtual nor padding. On fake tensors, which nobody compares, all
    of them."""
    if is_fake(x) or x.shape[1] < batch.width:
        return x
    real = torch.arange(batch.width)[None] < torch.tensor(batch.lengths)[:, None]
    return x[:, x.shape[1] - batch.width :][real.to(x.device)]
