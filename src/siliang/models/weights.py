"""Reads a model's weights from files piece by piece, so that nothing is in memory twice.

transformers maps a model's files into memory and creates the weights one after the other. The pages of the files stay
resident until the last weight is created: converted weights are then in memory in addition to the whole file, and one
unconverted weight keeps its whole file resident. Here, the pages of converted weights are released at once: loading
takes the memory of the converted weights, plus one piece for each of transformers' threads.

For this, the function with which transformers reads a weight is replaced during loading; only this file does it.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import EllipsisType
from typing import Protocol

import torch
from torch import Tensor
from transformers import core_model_loading

from siliang.capabilities import why_missing
from siliang.language import Bilingual, local
from siliang.memory.free import trim_heap
from siliang.ops.stored import StoredWeight, may_stay

PIECE_BYTES = 16 * 2**20  # of the file that are in memory at a time, in each of transformers' threads
QUANTIZING = {4: 12, 8: 8}  # bytes per weight that bitsandbytes needs on a CPU for quantization
LEAST_BYTES = 2**18  # for smaller weights, reading the process's memory mappings is not worthwhile


class Stored(Protocol):
    """A tensor, or a safetensors slice, which is read when indexed."""

    def __getitem__(self, index: EllipsisType, /) -> Tensor: ...


def passing_bytes(largest: int, *, bits: int | None, itemsize: int, cuda: bool = False) -> int:
    """The temporary memory of loading, in addition to the created weights, in bytes.

    Args:
        largest: The number of elements of the largest weight; with quantization, of the largest quantized weight.
        bits: The bits of quantized weights; None without quantization.
        itemsize: Bytes per element in the file.
        cuda: Quantization runs on a GPU, whose kernels need no temporary memory.
    """
    if bits is None:
        workers: int = getattr(core_model_loading, "GLOBAL_WORKERS", 4)
        return min(workers * PIECE_BYTES, largest * itemsize)
    return largest * (itemsize + (0 if cuda else QUANTIZING[bits]))


@contextmanager
def piece_by_piece(*, quantizing: bool, keeping: bool = False) -> Iterator[None]:
    """Within the block, transformers' `from_pretrained` reads weights piece by piece. They are the same, bit for bit.

    Args:
        quantizing: Weights are quantized after reading: they are read as copies, which are freed.
        keeping: Large matrices in half precision become `StoredWeight`s where fp32 is loaded.
    """
    if (missing := why_missing("weights loaded in pieces")) is not None:
        warnings.warn(
            Bilingual(
                f"Loading takes more memory than it needs: {missing}.", f"加载会占用更多内存：{local(missing, 'zh')}。"
            ),
            stacklevel=3,
        )
        yield
        return
    original = core_model_loading._materialize_copy
    core_model_loading._materialize_copy = partial(_materialize, quantizing, keeping)
    try:
        yield
    finally:
        core_model_loading._materialize_copy = original


def _materialize(
    copied: bool,
    keeping: bool,
    tensor: Stored,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A weight of the file on `device`, in `dtype`.

    Args:
        copied: Return a copy even if nothing is converted.
        keeping: As of `piece_by_piece`.
    """
    if copied:
        trim_heap()  # frees the temporary memory of quantizing the previous weight, several times its bytes
    mapped = tensor[...]
    there = mapped.device if device is None else torch.device(device)
    kind = mapped.dtype if dtype is None else dtype
    if there == mapped.device and kind == mapped.dtype and not copied:
        return mapped  # stays mapped: the system may share and reclaim its pages
    if keeping and there.type == mapped.device.type == "cpu" and may_stay(mapped.dtype, kind, mapped.shape):
        return StoredWeight(mapped, kind)
    if not _is_file(mapped):
        return mapped.to(device=device, dtype=dtype, copy=copied)
    if there.type != "cpu" or not mapped.is_contiguous():
        made = mapped.to(device=device, dtype=dtype, copy=True)
        _give_back(mapped)
        return made
    made = torch.empty_like(mapped, dtype=kind)
    flat, into, length = mapped.view(-1), made.view(-1), PIECE_BYTES // mapped.element_size()
    for start in range(0, len(flat), length):
        into[start : start + length].copy_(flat[start : start + length])
        _give_back(flat[: start + length])
    return made


def _is_file(x: Tensor) -> bool:
    """Whether a tensor is a private mapping of a file."""
    if sys.platform != "linux" or x.device.type != "cpu" or x.nbytes < LEAST_BYTES or not x.is_contiguous():
        return False
    first, last = x.data_ptr(), x.data_ptr() + x.nbytes
    try:
        with Path("/proc/self/maps").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                where, _, rest = line.partition(" ")
                start, _, end = where.partition("-")
                if int(start, 16) <= first and last <= int(end, 16):
                    _, _, _, inode, *_ = rest.split(maxsplit=4)
                    return inode != "0" and rest[3] == "p"
    except (OSError, ValueError):
        pass
    return False


def _give_back(x: Tensor) -> None:
    """Releases the pages that hold only `x`. If they are read again, they come from the file."""
    page = mmap.PAGESIZE
    first, last = -(-x.data_ptr() // page) * page, (x.data_ptr() + x.nbytes) // page * page
    if last > first:
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
