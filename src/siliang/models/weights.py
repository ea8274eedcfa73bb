"""How the bytes of a file of weights become a model's weights: piece by piece, and nothing is held twice.

transformers maps a model's files into memory and makes its weights from them one after the other; the files' pages stay
with the process until the last weight is made. Weights that are converted to another format then stand beside the whole
file, and one weight that is not converted keeps all of its file. Here the pages of what has been converted are given
back at once: loading takes what the converted weights take, and a piece for each of transformers' threads.

For this the function with which transformers reads one weight is replaced while a model is loaded, in this file alone.
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

PIECE_BYTES = 16 * 2**20  # of the file, that are there beside what becomes of them, in each of transformers' threads
QUANTIZING = {4: 12, 8: 8}  # bytes for each number of a weight that bitsandbytes takes on a CPU while it makes its bits
LEAST_BYTES = 2**18  # smaller weights are not worth a look at the process's mappings


class Stored(Protocol):
    """A tensor, or a slice of safetensors, which is read once it is indexed."""

    def __getitem__(self, index: EllipsisType, /) -> Tensor: ...


def passing_bytes(largest: int, *, bits: int | None, itemsize: int, cuda: bool = False) -> int:
    """What loading holds for a moment beside the weights that it has made.

    Args:
        largest: Numbers of the largest weight; of those that are quantized, where any is.
        bits: Of the quantized weights; None where none is.
        itemsize: Bytes of a number as it is read.
        cuda: It is quantized on a card, whose kernels take nothing for themselves.
    """
    if bits is None:
        workers: int = getattr(core_model_loading, "GLOBAL_WORKERS", 4)
        return min(workers * PIECE_BYTES, largest * itemsize)
    return largest * (itemsize + (0 if cuda else QUANTIZING[bits]))


@contextmanager
def piece_by_piece(*, quantizing: bool) -> Iterator[None]:
    """Within the block transformers' `from_pretrained` makes weights so. They are the same, bit for bit.

    Args:
        quantizing: Weights are quantized once they are read: what was read is a copy then, and is freed with it.
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
    usual = core_model_loading._materialize_copy
    core_model_loading._materialize_copy = partial(_materialize, quantizing)
    try:
        yield
    finally:
        core_model_loading._materialize_copy = usual


def _materialize(
    copied: bool, tensor: Stored, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """A weight of the file on `device`, in `dtype`.

    Args:
        copied: It is to be memory of its own even where nothing is converted.
    """
    if copied:
        trim_heap()  # of what quantizing the weight before took, several times its bytes
    mapped = tensor[...]
    there = mapped.device if device is None else torch.device(device)
    kind = mapped.dtype if dtype is None else dtype
    if there == mapped.device and kind == mapped.dtype and not copied:
        return mapped  # stays in the file, whose pages the system may share and take back
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
    """Whether a tensor's bytes are pages of a file that only this process sees, and nothing else."""
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
    """The pages that hold nothing but `x` leave the process; if they are read again, the file is."""
    page = mmap.PAGESIZE
    first, last = -(-x.data_ptr() // page) * page, (x.data_ptr() + x.nbytes) // page * page
    if last > first:
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
