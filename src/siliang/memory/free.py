"""Returns unused memory to the system."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch


def free_memory() -> None:
    """Releases what allocators keep, so that another run or another process can use it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Returns the free blocks in glibc's heap to the system; does nothing with another C library.

    glibc keeps free blocks of up to 32 MB, and steps with different numbers of tokens fit none of them exactly
    (docs/log.md). Takes some milliseconds.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
