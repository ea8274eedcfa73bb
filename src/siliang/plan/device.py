"""The device of a plan: its precision, its memory, and the overhead besides the tensors."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal, get_args

import psutil
import torch

from siliang.config import RunConfig
from siliang.hardware import Choice, choose_precision, describe_device
from siliang.language import Bilingual
from siliang.memory.track import CUDA_BLOCK_BYTES
from siliang.plan.history import known_work
from siliang.types import ConfigError

# The overhead of a process besides its tensors: measured, and corrected by the runs on this machine.
PROCESS_BYTES = 560_000_000  # Python with torch and transformers, resident, before a model is loaded
WORK_BYTES = 90_000_000  # memory that autograd, kernels and the allocator keep after a step
CUDA_CONTEXT_BYTES = 480_000_000  # context and loaded kernels: 0.4 to 0.6 GB by card and version
CUDA_WORK_BYTES = 40_000_000  # cuBLAS' workspace, which the allocator counts
CUDA_HOST_BYTES = 2_000_000_000  # the process on the host, with CUDA's libraries

MOST_CALIBRATION_S = 2.0
EFFICIENCY = 0.8  # speed of a step relative to matrix products alone: docs/benchmarks has 0.87 for W1

Kind = Literal["cpu", "cuda"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Device:
    """A device; it need not be in this machine.

    Attributes:
        memory_bytes: Memory for the run; None if unknown.
        process_bytes: Memory in use before the first tensor: the process, or CUDA's context.
        work_bytes: Overhead that training adds: the kernels' own memory, and fragmentation.
        here: The device is in this machine.
        flops: Floating-point operations per second, if the user gave them.
    """

    kind: Kind
    memory_bytes: int | None
    memory_source: Literal["free here", "as asked", "unknown"]
    precision: Choice
    process_bytes: int
    work_bytes: int
    here: bool
    flops: float | None = None

    @property
    def overhead_bytes(self) -> int:
        """All memory besides the tensors."""
        return self.process_bytes + self.work_bytes

    @property
    def budgeted_bytes(self) -> int:
        """The overhead that counts against train.memory_budget: on a CPU all of it; on CUDA what the allocator
        holds."""
        return self.work_bytes if self.kind == "cuda" else self.overhead_bytes

    @property
    def best(self) -> Choice:
        """The best precision for the device."""
        return choose_precision("auto", torch.device(self.kind)) if self.here else Choice("bf16", "assumed")

    @property
    def block_bytes(self) -> int:
        """The allocator's unit: a tensor takes a multiple of it."""
        return CUDA_BLOCK_BYTES if self.kind == "cuda" else 1

    @property
    def host_bytes(self) -> int:
        """Main memory of the process, if the device has its own memory; otherwise 0."""
        return CUDA_HOST_BYTES if self.kind == "cuda" else 0


def target_device(
    config: RunConfig, kind: str | None = None, *, memory_bytes: int | None = None, flops: float | None = None
) -> Device:
    """The device to plan for. It need not be in this machine.

    Args:
        kind: cpu or cuda; None for this machine's own.

    Raises:
        ConfigError: It is neither.
    """
    has_cuda = torch.cuda.is_available()
    kind = kind or ("cuda" if has_cuda else "cpu")
    if kind not in KINDS:
        raise ConfigError(Bilingual(f"device {kind!r} is not one of cpu, cuda.", f"设备 {kind!r} 不是 cpu 或 cuda。"))
    here = kind == "cpu" or has_cuda
    if here:
        precision = choose_precision(config.train.precision, torch.device(kind))
        if kind == "cuda":
            free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            free += CUDA_CONTEXT_BYTES  # already in use, and part of the plan
        else:
            free = psutil.virtual_memory().available
    else:
        free = None
        wanted = config.train.precision
        precision = (
            Choice("bf16", "assumed of a card that is not here") if wanted == "auto" else Choice(wanted, "as asked")
        )
    return Device(
        kind=kind,
        memory_bytes=memory_bytes or free,
        memory_source="as asked" if memory_bytes else "free here" if free else "unknown",
        precision=precision,
        process_bytes=CUDA_CONTEXT_BYTES if kind == "cuda" else PROCESS_BYTES,
        work_bytes=_work_bytes(kind, here=here),
        here=here,
        flops=flops,
    )


def share_memory(device: Device, processes: int) -> Device:
    """The device as each of these processes sees it: processes share the memory of a CPU, and each has its own card."""
    if device.kind != "cpu" or device.memory_source != "free here" or device.memory_bytes is None:
        return device
    return replace(device, memory_bytes=device.memory_bytes // processes)


def for_this_process(device: Device) -> Device:
    """The device for a run in this process, whose memory is part of the plan."""
    if device.kind != "cpu":
        return device
    in_use = psutil.Process().memory_info().rss
    free = device.memory_bytes
    if device.memory_source == "free here" and free is not None:
        free += in_use
    return replace(device, process_bytes=in_use, memory_bytes=free)


def _work_bytes(kind: Kind, *, here: bool) -> int:
    if here and (known := known_work(describe_device(torch.device(kind)).name)) is not None:
        return known
    return CUDA_WORK_BYTES if kind == "cuda" else WORK_BYTES


def measure_flops(dtype: torch.dtype, rows: int, width: int, inner: int, most_s: float = MOST_CALIBRATION_S) -> float:
    """Floating-point operations per second of this device at a model's shapes: (rows, width) by (width, inner), and
    back.

    Stops when five measurements agree within 5%, or after `most_s` seconds.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.randn(rows, width, device=device, dtype=dtype)
    w = torch.randn(width, inner, device=device, dtype=dtype)
    end, rates = time.perf_counter() + most_s, [0.0]
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(torch.mm(x, w), w.T)
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(4.0 * rows * width * inner / (time.perf_counter() - start))
        last = rates[-5:]
        if len(rates) > 5 and min(last) > 0.95 * max(last):
            break
    return sorted(rates[1:])[len(rates[1:]) // 2]
