"""A job, which is one training in a separate process, and the record of its result."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field

from bench.workloads import Layout, Library
from siliang.files import write_text
from siliang.hardware import has_bf16
from siliang.records import Device, Part

NAMES: dict[Library, str] = {
    "siliang": "siliang",
    "peft": "PEFT + Trainer",
    "trl": "TRL",
    "unsloth": "Unsloth",
    "swift": "ms-swift",
}
INSTRUCTION_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
Option = Literal["compiled", "reference first"]


class Setting(Part):
    """How a library is used."""

    dtype: Literal["own", "fp32", "bf16 storage", "bf16 weights", "bf16 autocast"] = "own"
    """own: siliang's choice. bf16 storage: frozen weights are kept in bf16, and computed with in fp32."""
    layout: Layout | Literal["own"] = "own"
    """Of a batch: rows in random order and padded; grouped by length and padded; or laid end to end."""
    options: list[Option] = Field(default_factory=list)
    """compiled: the layers by torch.compile. reference first: DPO's reference values of all rows, before the first
    step; their time counts."""

    def __str__(self) -> str:
        return "as it comes" if self.dtype == "own" else ", ".join([self.dtype, self.layout, *self.options])

    @classmethod
    def parse(cls, text: str) -> Setting:
        """The setting that is printed so.

        Raises:
            ValueError: There is none.
        """
        dtype, layout, *options = (part.strip() for part in text.split(","))
        return cls.model_validate({"dtype": dtype, "layout": layout, "options": options})


class Job(Part):
    """One training."""

    workload: str
    method: str
    library: Library
    setting: Setting = Field(default_factory=Setting)
    purpose: Literal["search", "gate", "time"]
    round: int = 0
    steps: int
    """Steps that are measured."""
    warmup: int
    """Steps before them."""
    batch: int | None = None
    """Rows of a step; None: the workload's own."""
    smoke: bool = False
    extra: dict[str, Any] = Field(default_factory=dict)
    """Settings of siliang's own."""

    @property
    def name(self) -> str:
        """Of the record's file."""
        setting = "" if self.library == "siliang" else "-" + str(self.setting).replace(", ", "-").replace(" ", "-")
        return f"{self.workload}-{self.method}-{self.library}{setting}-{self.purpose}{self.round}"


class Measurement(Part):
    """What a job gave."""

    # a loss may be nan, which plain JSON has no word for
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants")

    job: Job
    started_at: str
    """UTC, ISO 8601."""
    command: str
    """That started the bench."""
    device: Device
    versions: dict[str, str]
    instructions: str = ""
    """Of the processor, that torch uses."""
    code: str = ""
    """A hash of the code of siliang and of the bench."""
    precision: str = ""
    """What siliang chose."""
    error: str | None = None
    """Why there is no result."""
    trained: int = 0
    """Parameters that are trained."""
    start_sha256: str = ""
    """Over what is trained, before the first step."""
    tokens: int = 0
    """In the measured steps, padding left out."""
    seconds: float = 0.0
    """Of the measured steps."""
    imports_s: float = 0.0
    """From the start of the process until the library is imported; 0 where another process had imported it."""
    before_s: float = 0.0
    """From the start of the process to the training: imports, data, model."""
    warmup_s: float = 0.0
    """From there to the measured steps."""
    first_pass_s: float = 0.0
    """Of values computed before the training for the rows of the measured steps; these are in `before_s`, too."""
    loaded_bytes: int = 0
    """Before the first step."""
    peak_bytes: int = 0
    """The most, warm-up included."""
    limit_tokens_per_s: float | None = None
    """With the required matrix products alone; measured in siliang's processes."""
    losses: list[float] = Field(default_factory=list)
    grad_norms: list[float] = Field(default_factory=list)
    step_tokens: list[int] = Field(default_factory=list)
    """Tokens of each step, warm-up included: tells the data order."""

    @property
    def work_s(self) -> float:
        """Of the measured steps, with what was computed for them before."""
        return self.seconds + self.first_pass_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.work_s

    def seconds_of_rows(self, rows: int, batch: int) -> tuple[float, float]:
        """(seconds of a whole process that trains so many rows, seconds of them in steps)."""
        step = self.seconds / self.job.steps
        a_step = self.work_s / self.job.steps  # with its part of the first pass
        first_pass = (a_step - step) * (self.job.warmup + self.job.steps)
        outside = self.before_s - first_pass + max(0.0, self.warmup_s - self.job.warmup * step)
        inside = a_step * -(-rows // batch)
        return outside + inside, inside

    @property
    def above_bytes(self) -> int:
        """The peak above the loaded weights."""
        return self.peak_bytes - self.loaded_bytes

    def write(self, folder: Path) -> None:
        """Writes the record into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{self.job.name}.json", self.model_dump_json(indent=1) + "\n")


def read_records(folder: Path, names: str = "*.json") -> list[Measurement]:
    """The records in `folder` that are called so, by name."""
    return [Measurement.model_validate_json(p.read_text(encoding="utf-8")) for p in sorted(folder.glob(names))]


def instructions() -> str:
    """The instructions that torch uses here, and the variables that set them."""
    found = torch.backends.cpu.get_cpu_capability() + (" with bf16" if has_bf16(torch.device("cpu")) else "")
    set_by = [f"{name}={os.environ[name]}" for name in INSTRUCTION_VARIABLES if name in os.environ]
    return found + (f" (set by {', '.join(set_by)})" if set_by else "")


def code_sha256() -> str:
    """Over the code of siliang and of the bench: a measurement is kept as long as it is the same."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for path in sorted([*(root / "src" / "siliang").rglob("*.py"), *(root / "bench").glob("*.py")]):
        digest.update(f"{path.relative_to(root)}".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
