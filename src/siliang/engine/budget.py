"""The memory budget of training. The activations of layers that do not recompute and the cached outputs of frozen
layers share the memory that the model leaves.

The cache is filled first, in the first epoch. The activations get the rest; memory that the cache will still need is
reserved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import psutil
import torch
from torch import nn

from siliang.ops.masked_ce import CHUNK_BYTES

AUTO_SHARE = 0.85  # share of the free memory; the rest is for allocator overhead and other processes
CACHE_SHARE = 0.25  # share of the budget for the cache, before it continues in a file


class MemoryBudget:
    """The memory budget of one training.

    Attributes:
        limit: The bytes that the process (on CUDA: the allocator) may use; "auto" for most of the free memory; None for
            no limit.
        promised: Returns the bytes of main memory that the cache will still need.
    """

    def __init__(self, model: nn.Module, limit: int | Literal["auto"] | None, memory_share: float = 1.0) -> None:
        """
        Args:
            model: The trained model, on its device.
            memory_share: This process's share of the free main memory, if several processes train on one machine.
        """
        self.limit: int | Literal["auto"] | None = limit
        self.promised: Callable[[], float] = lambda: 0.0
        self._model, self._share = model, memory_share

    def for_activations(self) -> float:
        """The bytes for activations: the free memory minus gradients, Adam's moments, the head's chunks, and the memory
        reserved for the cache."""
        device = next(self._model.parameters()).device
        if device.type == "cuda":
            taken = torch.cuda.memory_allocated(device)
            free = float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - taken)
            return left(self.limit, taken, free) - self._to_come()
        return self._left_of_main_memory(self.limit) - self._to_come() - self.promised()

    def for_cache(self) -> int:
        """The bytes of main memory that the cache may use in total."""
        if next(self._model.parameters()).device.type == "cuda":  # the limit is for the GPU's memory
            return cache_share(self._left_of_main_memory("auto"))
        return cache_share(self._left_of_main_memory(self.limit) - self._to_come())

    def _left_of_main_memory(self, limit: int | Literal["auto"] | None) -> float:
        free = psutil.virtual_memory().available * self._share
        return left(limit, psutil.Process().memory_info().rss, free)

    def _to_come(self) -> float:
        trained = [p for p in self._model.parameters() if p.requires_grad]
        return trained_bytes_to_come(sum(p.nbytes for p in trained), sum(p.nbytes for p in trained if p.grad is None))


def left(limit: int | Literal["auto"] | None, taken: float, free: float) -> float:
    """The bytes that may be used in addition to those in use.

    Args:
        free: The free bytes of the device.
    """
    return float(limit) - taken if isinstance(limit, int) else AUTO_SHARE * free


def trained_bytes_to_come(trained: float, without_gradient: float) -> float:
    """The bytes of gradients, Adam's moments and the head's chunks.

    Args:
        trained: The bytes of the trained parameters.
        without_gradient: The bytes of those that have no gradient yet.
    """
    return 2 * trained + without_gradient + 4 * CHUNK_BYTES


def cache_share(left_bytes: float) -> int:
    """The bytes of these that the cache may use."""
    return max(0, int(CACHE_SHARE * left_bytes))
