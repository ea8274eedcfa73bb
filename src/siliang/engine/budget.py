"""The memory budget of a training. Besides the model, two things share it: the activations of layers that do not
recompute, and the cached outputs of frozen layers.

The cache is filled first, in the first epoch. The activations have the rest, without the memory that the cache has yet
to take. The plan (plan/budget.py) uses the functions of this file, so that it decides as the engine does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import psutil
import torch
from torch import nn

from siliang.ops.masked_ce import CHUNK_BYTES

AUTO_SHARE = 0.85  # of the free memory: the rest is for the allocator's fragmentation and for other processes
ADAM_STATE = 2.0  # two moments; each optimizer's share is in train/optimizer.py
CACHE_SHARE = 0.25  # of the budget, for the cache in memory; beyond it, the cache continues in a file


class MemoryBudget:
    """The memory that one training may take.

    Attributes:
        limit: Bytes of the process (on CUDA: of the allocator); "auto" for AUTO_SHARE of the free memory; None for no
            limit of the activations: the cache then takes its share as with "auto".
        promised: Returns the bytes of main memory that the cache has yet to take.
    """

    def __init__(
        self,
        model: nn.Module,
        limit: int | Literal["auto"] | None,
        memory_share: float = 1.0,
        state_share: float = ADAM_STATE,
    ) -> None:
        """
        Args:
            model: The trained model, on its device.
            memory_share: This process's share of a CPU's free memory, if the training has several processes.
            state_share: Bytes of the optimizer's state for each byte of a trained weight.
        """
        self.limit: int | Literal["auto"] | None = limit
        self.promised: Callable[[], float] = lambda: 0.0
        self._model, self._share, self._state_share = model, memory_share, state_share

    def for_activations(self) -> float:
        """Bytes for the activations of the layers: the rest of the budget without gradients, the optimizer's state,
        the chunks of logits, and the bytes that are promised to the cache."""
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
        without_gradient = sum(p.nbytes for p in trained if p.grad is None)
        return trained_bytes_to_come(sum(p.nbytes for p in trained), without_gradient, self._state_share)


def left(limit: int | Literal["auto"] | None, taken: float, free: float) -> float:
    """Bytes that may be taken in addition.

    Args:
        limit: As of `MemoryBudget`; None as "auto".
        taken: Bytes in use.
        free: Free bytes of the device.
    """
    return float(limit) - taken if isinstance(limit, int) else AUTO_SHARE * free


def trained_bytes_to_come(trained: float, without_gradient: float, state_share: float = ADAM_STATE) -> float:
    """Bytes that a training has yet to take for gradients, the optimizer's state and the chunks of logits.

    Args:
        trained: Bytes of the trained parameters.
        without_gradient: Bytes of those without a gradient.
        state_share: As of `MemoryBudget`.
    """
    return state_share * trained + without_gradient + 4 * CHUNK_BYTES


def cache_share(left_bytes: float) -> int:
    """The cache's share of a budget, in bytes."""
    return max(0, int(CACHE_SHARE * left_bytes))
