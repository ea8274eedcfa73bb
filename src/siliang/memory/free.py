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
    trim_heap()


def trim_heap() -> None:
    """Gives back the free blocks that lie scattered in the heap, where the C library is glibc: it keeps those of up to
    32 MB, and steps of unlike tokens fit none of them exactly (docs/log.md). Takes some milliseconds."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
