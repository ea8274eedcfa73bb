"""The device that is there, and the number format that suits it."""

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

FP16_ADAM_EPS = 1e-4  # Adam's own 1e-8 is 0 in fp16, whose smallest number is 6e-8: it would divide by zero


@dataclass
class Machine:
    """What the rules need to know of the hardware.

    Attributes:
        kind: cpu, cuda or mps.
        native_bf16: bf16 is computed in hardware.
    """

    kind: str = "cpu"
    native_bf16: bool = True


@dataclass(frozen=True)
class Choice:
    """A precision, and why."""

    precision: Precision
    reason: str

    @property
    def compute(self) -> Literal["fp32", "bf16", "fp16"]:
        """The number format of the computation alone."""
        return self.precision.removeprefix("pure-")  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation, and of the weights that are not trained."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.compute]

    @property
    def pure(self) -> bool:
        """Trained weights, gradients and Adam's moments have 16 bits too."""
        return self.precision.startswith("pure-")

    @property
    def autocast(self) -> bool:
        """Trained weights stay fp32 and are cast where they are used."""
        return self.precision in ("bf16", "fp16")

    @property
    def adam_eps(self) -> float:
        return FP16_ADAM_EPS if self.precision == "pure-fp16" else 1e-8


def find_device() -> torch.device:
    """CUDA where it is, otherwise the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def choose_precision(wanted: Precision | Literal["auto"], device: torch.device) -> Choice:
    """The number format of the computation: what was asked for, with a word where it will be slow, or the best one."""
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
    """Whether bf16 is computed in hardware: Ampere and later cards, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):  # also where ATEN_CPU_CAPABILITY asks for that
        return False
    return any(getattr(torch.cpu, probe, bool)() for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def describe_device(device: torch.device) -> Device:
    """The device as the record names it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory_bytes = properties.name, properties.total_memory
    else:
        name, memory_bytes = _cpu_name(), psutil.virtual_memory().total
    return Device(kind=device.type, name=name, threads=torch.get_num_threads(), memory_bytes=memory_bytes)


def machine() -> Machine:
    """What the rules of `siliang check` need to know of this machine."""
    device = find_device()
    return Machine(device.type, has_bf16(device))


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
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
