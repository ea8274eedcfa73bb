"""The schema of run.json: what every run writes down, and everything that reports reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from siliang.files import replacing
from siliang.secrets import without_secrets
from siliang.types import ConfigError

SCHEMA_VERSION = 1
RECORD_NAME = "run.json"


class Part(BaseModel):
    """A part of the record."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Device(Part):
    """Where the run computed."""

    kind: str
    """cpu, cuda or mps."""
    name: str
    """The processor's or card's name."""
    threads: int
    """CPU threads that torch used."""
    memory_bytes: int
    """The device's memory, all of it."""


class Counts(Part):
    """Parameters."""

    trained: int
    total: int
    """Of the model that was there, adapters and copied heads included."""
    adapter_bytes: int = 0
    """Size of the saved adapter (or model, for full fine-tuning) on disk."""


class Rows(Part):
    """The data as it was used."""

    train: int
    eval: int
    skipped: list[str] = Field(default_factory=list)
    """Rows left out: file, line and reason."""
    truncated: int = 0
    """Training rows that were cut to max_length."""


class Seconds(Part):
    """Wall-clock time."""

    load: float = 0.0
    """Data and model, up to the first step."""
    train: float = 0.0
    """All steps, with the evaluations between them."""
    eval: float = 0.0
    """The evaluation at the end."""


class Memory(Part):
    """Peak memory: of the device with CUDA, else resident memory of the process."""

    loaded_bytes: int = 0
    """Before the first step."""
    peak_bytes: int = 0
    """The most during training."""
    peak_bytes_by_rank: list[int] = Field(default_factory=list)
    """Of each process, where there were several; peak_bytes is the most."""
    predicted_bytes: int | None = None
    """What the plan said; None where it was not asked."""
    recomputed_layers: int = 0
    """Layers that computed their activations twice, in the batch where it was most."""
    predicted_parts: dict[str, int] = Field(default_factory=dict)
    """What that is made of: weights, trained, gradients, optimizer, activations, logits, workspace, and what lies
    beside the tensors (overhead)."""


class StepMetrics(Part):
    """One line of the log."""

    step: int
    epoch: float
    loss: float | None = None
    """Mean training loss since the line before."""
    eval_loss: float | None = None
    accuracy: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None


class Record(Part):
    """run.json."""

    schema_version: int = SCHEMA_VERSION
    status: Literal["running", "completed", "interrupted", "failed"] = "running"
    error: str | None = None
    started_at: str
    """UTC, ISO 8601."""
    config: dict[str, Any]
    """The resolved config."""
    seed: int
    versions: dict[str, str]
    device: Device
    precision: str
    """fp32, bf16 or fp16: what was really used."""
    learning_rate: float
    """What was really used."""
    model_sha256: str
    """Over the base model's weight files."""
    data_sha256: str
    """Over the data files."""
    labels: list[str] | None = None
    layout: str = ""
    """How the rows were laid out: a name that data.format knows."""
    columns: dict[str, str] = Field(default_factory=dict)
    """The data's column of each part of the layout: {text: review, label: label}."""
    parameters: Counts
    rows: Rows
    seconds: Seconds = Field(default_factory=Seconds)
    tokens_trained: int = 0
    """Tokens that went through the model in training, padding left out."""
    memory: Memory = Field(default_factory=Memory)
    steps: list[StepMetrics] = Field(default_factory=list)
    passed_over: list[int] = Field(default_factory=list)
    """Steps that were not made because their loss or gradient was no number (train.on_nan)."""
    best_step: int | None = None
    """The step whose weights were saved, where train.best chose."""
    final: dict[str, float] = Field(default_factory=dict)
    """Metrics at the end: eval_loss, accuracy or perplexity, base_eval_loss where measured."""

    def write(self, folder: Path) -> None:
        """Writes run.json into `folder`, never half of it."""
        with replacing(folder / RECORD_NAME) as temporary:
            temporary.write_text(without_secrets(self.model_dump_json(indent=1)) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Reads run.json.

        Raises:
            ConfigError: It is missing or damaged.
        """
        path = folder / RECORD_NAME
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{folder} is no run folder: {RECORD_NAME} is missing there.") from None
        except (ValidationError, OSError, ValueError) as error:
            raise ConfigError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
