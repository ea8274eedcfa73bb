"""This machine's device, and its best precision."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import psutil
import torch

from siliang.language import Bilingual
from siliang.records import Device

Precision = Literal["fp32", "bf16", "fp16", "pure-bf16", "pure-fp16"]
Format = Literal["fp32", "bf16", "fp16"]
FORMATS: dict[Precision, Format] = {
    "fp32": "fp32",
    "bf16": "bf16",
    "fp16": "fp16",
    "pure-bf16": "bf16",
    "pure-fp16": "fp16",
}

FP16_ADAM_EPS = 1e-4  # Adam's default 1e-8 is 0 in fp16, whose smallest number is 6e-8: it would divide by zero


@dataclass
class Machine:
    """The hardware, as the rules of `siliang check` need it.

    Attributes:
        kind: cpu, cuda or mps.
        native_bf16: The hardware computes bf16.
    """

    kind: str = "cpu"
    native_bf16: bool = True


@dataclass(frozen=True)
class Choice:
    """A precision, and the reason for it."""

    precision: Precision
    reason: str

    @property
    def compute(self) -> Format:
        """The precision of the computation."""
        return FORMATS[self.precision]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation, and of the weights that are not trained."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.compute]

    @property
    def pure(self) -> bool:
        """Whether trained weights, gradients and Adam's moments have 16 bits too."""
        return self.precision.startswith("pure-")

    @property
    def autocast(self) -> bool:
        """Whether trained weights stay fp32 and are cast for the computation."""
        return self.precision in ("bf16", "fp16")

    @property
    def adam_eps(self) -> float:
        return FP16_ADAM_EPS if self.precision == "pure-fp16" else 1e-8


def find_device() -> torch.device:
    """The current CUDA device if there is one, otherwise the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def choose_precision(wanted: Precision | Literal["auto"], device: torch.device) -> Choice:
    """The precision that the user chose, with a note if it is slow here; for auto, the best one of the device."""
    native = has_bf16(device)
    if wanted != "auto":
        choice = Choice(wanted, Bilingual("as asked", "按设置"))
        if choice.compute == "bf16" and not native:
            reason = Bilingual(
                f"as asked, but this {device.type} only emulates it: fp32 is faster here",
                f"按设置，但这个 {device.type} 只能模拟：fp32 更快",
            )
            return replace(choice, reason=reason)
        if choice.compute == "fp16" and device.type == "cpu":
            reason = Bilingual(
                "as asked, but CPUs emulate it: fp32 is faster here", "按设置，但 CPU 只能模拟：fp32 更快"
            )
            return replace(choice, reason=reason)
        return choice
    if native:
        return Choice("bf16", Bilingual(f"this {device.type} computes it natively", f"这个 {device.type} 原生支持"))
    if device.type == "cuda":
        return Choice("fp16", Bilingual("this card has no bf16; the loss is scaled", "显卡不支持 bf16；使用损失缩放"))
    return Choice("fp32", Bilingual("this CPU has no bf16 arithmetic", "这个 CPU 不支持 bf16 运算"))


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes bf16: Ampere and later GPUs, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):  # also if ATEN_CPU_CAPABILITY sets it
        return False
    return any(getattr(torch.cpu, probe, bool)() for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def describe_device(device: torch.device) -> Device:
    """The device, as a record describes it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory_bytes = properties.name, properties.total_memory
    else:
        name, memory_bytes = _cpu_name(), psutil.virtual_memory().total
    return Device(kind=device.type, name=name, threads=torch.get_num_threads(), memory_bytes=memory_bytes)


def machine() -> Machine:
    """This machine's hardware."""
    device = find_device()
    return Machine(device.type, has_bf16(device))


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that determine a result."""
    names = ("siliang", "torch", "transformers", "accelerate", "datasets", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
