"""The prompts of texts that are written at once: which go into a batch, how they are padded, and what they share.

The first tokens that all prompts of a batch have in common are computed once, in a batch of one row. What follows them
is padded in front, behind the shared keys and values:

    a b c d e          a b | c d e
    a b f         =>       | . . f

A decoder writes on from the last column. Positions are counted by the attention mask, which leaves the padding out.

Shapes: B prompts, T columns, C common tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from siliang.engine.batches import in_steps
from siliang.ops.beginnings import LEAST_SAVED, LEAST_SHARE, common_tokens

LEAST_IN_BATCH = 64  # tokens that a batch has to save: it computes one row more (docs/log.md)


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that are answered at once.

    Attributes:
        numbers: Of the prompts.
        common: The first tokens of all of them, which are computed once; 0 for none.
    """

    numbers: tuple[int, ...]
    common: int = 0


def prompt_batches(
    prompts: Mapping[int, Sequence[int]], size: int, *, longest_shared: int | None = 0, copies: int = 1
) -> list[PromptBatch]:
    """The batches of prompts. Those of similar length are together, or those that begin alike, if that costs less.
    The longest come first: a lack of memory shows at once.

    Args:
        prompts: The tokens of each, by its number.
        size: The most prompts of a batch.
        longest_shared: The most columns of a batch that shares its beginning; None for no limit, 0 for none.
        copies: The beams of the search: each prompt is computed once for each.
    """
    by_length = sorted(prompts, key=lambda i: -len(prompts[i]))
    orders = [by_length]
    if longest_shared != 0 and len(prompts) > 1:
        alike = sorted(prompts, key=lambda i: list(prompts[i]))
        orders += [_in_groups(prompts, alike), alike]
    found = [[_batch(prompts, part, longest_shared, copies) for part in in_steps(order, size)] for order in orders]
    best = min(found, key=lambda batches: sum(_cost(prompts, batch, copies) for batch in batches))
    return sorted(best, key=lambda batch: -_width(prompts, batch))


def padded_prompts(prompts: Sequence[Sequence[int]], pad: int, *, left: bool, common: int = 0) -> dict[str, Tensor]:
    """The inputs of generate for prompts that are answered at once: input_ids and attention_mask, (B, T).

    Args:
        left: Put the padding in front: a decoder writes on from the last column.
        common: The number of shared first tokens; they stand before the padding.
    """
    width = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), width), pad), torch.zeros(len(prompts), width, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        tokens, behind = torch.tensor(prompt), width - len(prompt) + common
        places = [slice(common), slice(behind, width)] if left else [slice(common), slice(common, len(prompt))]
        for place, own in zip(places, (tokens[:common], tokens[common:]), strict=True):
            ids[i, place], mask[i, place] = own, 1
    return {"input_ids": ids, "attention_mask": mask}


def common_beginning(prompts: Iterable[Sequence[int]]) -> int:
    """The tokens with which all prompts begin."""
    ordered = sorted(map(list, prompts))
    return _common(ordered[0], ordered[-1])  # what the first and the last have in common all between them have


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The tokens with which both begin."""
    return common_tokens(*(np.array(x, np.int64).tobytes() for x in (a, b)), size=8)


def _in_groups(prompts: Mapping[int, Sequence[int]], alike: Sequence[int]) -> list[int]:
    """Those that begin alike follow one another, the longest first."""
    groups = [[alike[0]]]
    for a, b in pairwise(alike):
        if _common(prompts[a], prompts[b]) < LEAST_SAVED:
            groups.append([])
        groups[-1].append(b)
    return [i for group in groups for i in sorted(group, key=lambda i: -len(prompts[i]))]


def _batch(
    prompts: Mapping[int, Sequence[int]], numbers: Sequence[int], longest_shared: int | None, copies: int
) -> PromptBatch:
    batch = PromptBatch(tuple(numbers))
    rows, width = [prompts[i] for i in numbers], _width(prompts, batch)
    if len(rows) * copies < 2 or (longest_shared is not None and width > longest_shared):
        return batch
    common = min(common_beginning(rows), min(map(len, rows)) - 1)  # each has a token of its own, whose logits are read
    shared = PromptBatch(batch.numbers, common)
    before = _cost(prompts, batch, copies)
    saved = before - _cost(prompts, shared, copies)
    return shared if saved >= max(LEAST_IN_BATCH, LEAST_SHARE * before) else batch


def _width(prompts: Mapping[int, Sequence[int]], batch: PromptBatch) -> int:
    return max(len(prompts[i]) for i in batch.numbers)


def _cost(prompts: Mapping[int, Sequence[int]], batch: PromptBatch, copies: int) -> int:
    """The tokens of all prompts that the model computes, padding included."""
    return batch.common + len(batch.numbers) * copies * (_width(prompts, batch) - batch.common)
