"""What a plan is for: a device, its format, its memory, and what lies beside the tensors."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal

import psutil
import torch

from siliang.config import RunConfig
from siliang.hardware import Choice, choose_precision, describe_device
from siliang.language import Bilingual
from siliang.memory.track import CUDA_BLOCK_BYTES
from siliang.plan.history import known_work
from siliang.types import ConfigError

# What a process holds beside its tensors; measured where it could be, and corrected by this machine's own runs.
PROCESS_BYTES = 560_000_000  # Python with torch and transformers, resident, before a model is there
WORK_BYTES = 90_000_000  # what autograd, kernels and the allocator keep once it has trained
CUDA_CONTEXT_BYTES = 480_000_000  # context and loaded kernels: 0.4 to 0.6 GB by card and version
CUDA_WORK_BYTES = 40_000_000  # cuBLAS' workspace, which the allocator counts
CUDA_HOST_BYTES = 2_000_000_000  # the process on the host, with CUDA's libraries

MOST_CALIBRATION_S = 2.0
EFFICIENCY = 0.8  # a step's speed as a share of bare matrix products': docs/benchmarks has 0.87 for W1


@dataclass(frozen=True)
class Device:
    """A device that may not be here.

    Attributes:
        memory_bytes: What a run may take; None where that is not known.
        here: The device is in this machine.
        flops: What it computes in a second, as the user says.
        process_bytes: What is there before a tensor is: the process, or CUDA's context.
        work_bytes: What comes to it once there is work: kernels' own memory, the allocator's losses.
    """

    kind: Literal["cpu", "cuda"]
    memory_bytes: int | None
    memory_source: Literal["free here", "as asked", "unknown"]
    precision: Choice
    process_bytes: int
    work_bytes: int
    here: bool
    flops: float | None = None

    @property
    def overhead_bytes(self) -> int:
        """Everything beside the tensors."""
        return self.process_bytes + self.work_bytes

    @property
    def budgeted_bytes(self) -> int:
        """Of the overhead, what counts against train.memory_budget: all of a process; on CUDA, what the allocator
        holds."""
        return self.work_bytes if self.kind == "cuda" else self.overhead_bytes

    @property
    def best(self) -> Choice:
        """The format that suits it."""
        return choose_precision("auto", torch.device(self.kind)) if self.here else Choice("bf16", "assumed")

    @property
    def block_bytes(self) -> int:
        """A tensor takes a multiple of it."""
        return CUDA_BLOCK_BYTES if self.kind == "cuda" else 1

    @property
    def host_bytes(self) -> int:
        """The process's own memory, where the device has another."""
        return CUDA_HOST_BYTES if self.kind == "cuda" else 0


def target_device(
    config: RunConfig, kind: str | None = None, *, memory_bytes: int | None = None, flops: float | None = None
) -> Device:
    """The device to plan for: the one that is here, or one that is not.

    Args:
        kind: cpu or cuda; None for what is here.

    Raises:
        ConfigError: It is neither.
    """
    has_cuda = torch.cuda.is_available()
    kind = kind or ("cuda" if has_cuda else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ConfigError(Bilingual(f"device {kind!r} is not one of cpu, cuda.", f"设备 {kind!r} 不是 cpu 或 cuda。"))
    here = kind == "cpu" or has_cuda
    if here:
        precision = choose_precision(config.train.precision, torch.device(kind))
        if kind == "cuda":
            free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            free += CUDA_CONTEXT_BYTES  # which is taken already
        else:
            free = psutil.virtual_memory().available
    else:
        free = None
        wanted = config.train.precision
        precision = (
            Choice("bf16", "assumed of a card that is not here") if wanted == "auto" else Choice(wanted, "as asked")
        )
    return Device(
        kind=kind,  # type: ignore[arg-type]
        memory_bytes=memory_bytes or free,
        memory_source="as asked" if memory_bytes else "free here" if free else "unknown",
        precision=precision,
        process_bytes=CUDA_CONTEXT_BYTES if kind == "cuda" else PROCESS_BYTES,
        work_bytes=_work_bytes(kind, here=here),
        here=here,
        flops=flops,
    )


def share_memory(device: Device, processes: int) -> Device:
    """The same, where so many processes are on one CPU; cards are not shared."""
    if device.kind != "cpu" or device.memory_source != "free here" or device.memory_bytes is None:
        return device
    return replace(device, memory_bytes=device.memory_bytes // processes)


def for_this_process(device: Device) -> Device:
    """The same for a run in this very process, whose memory counts as part of the plan."""
    if device.kind != "cpu":
        return device
    taken = psutil.Process().memory_info().rss
    free = device.memory_bytes
    if device.memory_source == "free here" and free is not None:
        free += taken  # what is taken already is part of the plan
    return replace(device, process_bytes=taken, memory_bytes=free)


def _work_bytes(kind: str, *, here: bool) -> int:
    if here and (known := known_work(describe_device(torch.device(kind)).name)) is not None:
        return known
    return CUDA_WORK_BYTES if kind == "cuda" else WORK_BYTES


def measure_flops(dtype: torch.dtype, rows: int, width: int, inner: int, most_s: float = MOST_CALIBRATION_S) -> float:
    """Products per second of this device at a model's own shapes: (rows, width) by (width, inner), and back.

    It stops as soon as five runs agree within 5%, or after `most_s` seconds and the run that is under way.
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
