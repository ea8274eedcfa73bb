"""The state of all random generators that training uses."""

from __future__ import annotations

import random
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor


class RandomState(TypedDict):
    """The states of Python's generator, numpy's, torch's, and those of the CUDA devices."""

    python: tuple[object, ...]
    numpy: tuple[str, list[int], int, int, float]
    torch: Tensor
    cuda: list[Tensor]


def numpy_state() -> tuple[str, np.ndarray, int, int, float]:
    """The state of numpy's generator: its name, its keys (624,), the position in them, and the cached normal value."""
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)
    return state


def random_state() -> RandomState:
    """The states of all generators that training uses."""
    name, keys, place, has_gauss, gauss = numpy_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), place, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: RandomState) -> None:
    """Restores a `random_state`."""
    name, keys, place, has_gauss, gauss = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), place, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
