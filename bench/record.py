"""A job, which is one training in a separate process, and the record of its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from bench.workloads import Layout, Library
from siliang.records import Device, Part

NAMES: dict[Library, str] = {"siliang": "siliang", "peft": "PEFT + Trainer", "trl": "TRL SFTTrainer"}


class Setting(Part):
    """How a library is used."""

    dtype: Literal["own", "fp32", "bf16 weights", "bf16 autocast"] = "own"
    """own: siliang's choice."""
    layout: Layout | Literal["own"] = "own"
    """Of a batch: rows in random order and padded; grouped by length and padded; or laid end to end."""

    def __str__(self) -> str:
        return "as it comes" if self.dtype == "own" else f"{self.dtype}, {self.layout}"


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
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def above_bytes(self) -> int:
        """The peak above the loaded weights."""
        return self.peak_bytes - self.loaded_bytes

    def write(self, folder: Path) -> None:
        """Writes the record into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.job.name}.json").write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_records(folder: Path) -> list[Measurement]:
    """Every record in `folder`, by name."""
    return [Measurement.model_validate_json(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
