"""What is not used any more goes back to the machine."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch


def free_memory() -> None:
    """Gives back what allocators have kept: another run, or another process, may want it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
