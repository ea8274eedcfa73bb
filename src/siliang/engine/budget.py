"""The memory that a training may take. Two things are kept in what the model leaves of it, and both draw from here: the
activations of layers that do not recompute, and the outputs of frozen layers.

What is cached draws first, in the first epoch; the activations have what is left, and what the cache will take yet is
not theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import psutil
import torch
from torch import nn

from siliang.ops.masked_ce import CHUNK_BYTES

AUTO_SHARE = 0.85  # of the free memory: the allocator's own losses and what others take need the rest
CACHE_SHARE = 0.25  # of the budget that the cache may take before it continues in a file


class MemoryBudget:
    """What one training may take.

    Attributes:
        limit: Bytes that the process (on CUDA: the allocator) may take; "auto" for most of what is free; None for no
            limit.
        promised: Gives the bytes of main memory that the cache will take yet.
    """

    def __init__(self, model: nn.Module, limit: int | Literal["auto"] | None, memory_share: float = 1.0) -> None:
        """
        Args:
            model: That is trained, on its device.
            memory_share: Of a CPU's free memory, what this process may take beside others of the same training.
        """
        self.limit: int | Literal["auto"] | None = limit
        self.promised: Callable[[], float] = lambda: 0.0
        self._model, self._share = model, memory_share

    def for_activations(self) -> float:
        """Bytes for what the layers keep: what is left without gradients, Adam's moments and the head's chunks, and
        without what is promised to the cache."""
        device = next(self._model.parameters()).device
        if device.type == "cuda":
            taken = torch.cuda.memory_allocated(device)
            free = float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - taken)
            return left(self.limit, taken, free) - self._to_come()
        return self._left_of_main_memory(self.limit) - self._to_come() - self.promised()

    def for_cache(self) -> int:
        """Bytes of main memory that the cache may take in all."""
        if next(self._model.parameters()).device.type == "cuda":  # the limit is the card's
            return cache_share(self._left_of_main_memory("auto"))
        return cache_share(self._left_of_main_memory(self.limit) - self._to_come())

    def _left_of_main_memory(self, limit: int | Literal["auto"] | None) -> float:
        free = psutil.virtual_memory().available * self._share
        return left(limit, psutil.Process().memory_info().rss, free)

    def _to_come(self) -> float:
        trained = [p for p in self._model.parameters() if p.requires_grad]
        return trained_bytes_to_come(sum(p.nbytes for p in trained), sum(p.nbytes for p in trained if p.grad is None))


def left(limit: int | Literal["auto"] | None, taken: float, free: float) -> float:
    """Bytes that may be taken beside those that are taken already.

    Args:
        free: Of the device.
    """
    return float(limit) - taken if isinstance(limit, int) else AUTO_SHARE * free


def trained_bytes_to_come(trained: float, without_gradient: float) -> float:
    """Bytes of gradients, Adam's moments and the head's chunks.

    Args:
        trained: Bytes of what is trained.
        without_gradient: Of those, what has no gradient yet.
    """
    return 2 * trained + without_gradient + 4 * CHUNK_BYTES


def cache_share(left_bytes: float) -> int:
    """Bytes of these that the cache may take."""
    return max(0, int(CACHE_SHARE * left_bytes))
