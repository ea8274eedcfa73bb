"""The schema of run.json: what every run writes down, and everything that reports reads."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from siliang.files import replacing
from siliang.safe_json import dump_json
from siliang.secrets import redacted
from siliang.types import ConfigError, first_line

SCHEMA_VERSION = 1
RECORD_NAME = "run.json"


@dataclass(frozen=True)
class Predicted:
    """What a plan said of a run.

    Attributes:
        parts: Of the steps' peak, as `Memory.predicted_parts`.
        loading_bytes: The most while the model is loaded.
    """

    parts: dict[str, int] = field(default_factory=dict)
    loading_bytes: int = 0

    @property
    def peak_bytes(self) -> int | None:
        """The larger of loading and the steps; None where there was no plan."""
        return max(sum(self.parts.values()), self.loading_bytes) or None


class Part(BaseModel):
    """A part of the record."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Saved(Part):
    """A part that is a file of its own."""

    def save(self, path: Path) -> None:
        """Writes the file, never half of it, with no secret in it."""
        text = dump_json(_finite(self.model_dump(mode="json")), indent=1)
        with replacing(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def open(cls, path: Path) -> Self:
        """Reads the file.

        Raises:
            ConfigError: It is missing or damaged.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path.parent} holds no {path.name}.") from None
        except (ValidationError, OSError, ValueError) as error:
            raise ConfigError(f"{path} is damaged: {first_line(error)}") from None


def plain(value: Any) -> Any:
    """Values as a record's file holds them: no secrets, and as text the numbers that JSON does not have, NaN and
    Infinity, which the record's fields read back as numbers."""
    return redacted(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


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

    loading_bytes: int = 0
    """The most while the model was loaded and prepared."""
    loaded_bytes: int = 0
    """Before the first step."""
    steps_bytes: int = 0
    """The most during the steps and evaluations."""
    peak_bytes: int = 0
    """The most from before the model was loaded to the last evaluation: the larger of both."""
    peak_bytes_by_rank: list[int] = Field(default_factory=list)
    """Of each process, where there were several; peak_bytes is the most."""
    predicted_bytes: int | None = None
    """What the plan said of the peak; None where it was not asked."""
    predicted_loading_bytes: int | None = None
    """And of loading alone."""
    recomputed_layers: int = 0
    """Layers that computed their activations twice, in the batch where it was most."""
    predicted_parts: dict[str, int] = Field(default_factory=dict)
    """What the steps' peak is made of: weights, trained, gradients, optimizer, activations, logits, workspace, and what
    lies beside the tensors (overhead)."""

    @property
    def above_bytes(self) -> int:
        """What the steps took above the loaded model."""
        return (self.steps_bytes or self.peak_bytes) - self.loaded_bytes


class StepMetrics(Part):
    """One line of the log."""

    step: int
    epoch: float
    loss: float | None = None
    """Mean training loss since the line before."""
    eval_loss: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    """The other figures of an evaluation on the held-out rows, by which train.best may choose: accuracy, f1, ..."""
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None


class File(Part):
    """A file, or a folder of files, that a run read."""

    path: str
    sha256: str


LOWER_IS_BETTER = ("loss", "eval_loss", "perplexity")  # of a run's figures; of every other, more is better


def higher_is_better(figure: str) -> bool:
    """The direction of a figure of a run's held-out rows."""
    return figure not in LOWER_IS_BETTER


def better(figure: str, new: float, old: float | None) -> bool:
    """Whether a figure's new value is better than its old one, or than none at all (None); a number is better than
    NaN."""
    if old is None or math.isnan(old):
        return old is None or not math.isnan(new)
    return new > old if higher_is_better(figure) else new < old


class Record(Saved):
    """run.json."""

    schema_version: int = SCHEMA_VERSION
    status: Literal["running", "completed", "interrupted", "failed"] = "running"
    error: str | None = None
    started_at: str
    """UTC, ISO 8601."""
    config: dict[str, Any]
    """The resolved config: what was really used. Names of files and folders are absolute."""
    adjusted: dict[str, Any] = Field(default_factory=dict)
    """Settings that the run changed itself (train.fit, the strategy of several devices), by their dotted names, as they
    were asked for."""
    changed: list[str] = Field(default_factory=list)
    """Settings that were changed between two parts of the run: from which step on, what, and what it was."""
    seed: int
    versions: dict[str, str]
    device: Device
    precision: str
    """fp32, bf16 or fp16: what was really used."""
    learning_rate: float
    """What was really used."""
    model_sha256: str
    """Over the base model's weight files."""
    model_files: dict[str, str] = Field(default_factory=dict)
    """The SHA-256 of each file of the base model: weights, configs, tokenizer. Empty where there are none here."""
    data_sha256: str
    """Over the data files."""
    data_files: list[File] = Field(default_factory=list)
    """The same for each source, those held out behind those trained on; and for a template that is a file."""
    code_sha256: str | None = None
    """Over the folder of a model whose own code ran (SECURITY.md). It says what ran, and allows nothing."""
    adapter_sha256: str | None = None
    """Over the adapter whose weights the training began with (`adapter` in the config)."""
    labels: list[str] | None = None
    layout: str = ""
    """How the rows were laid out: a name that data.format knows."""
    columns: dict[str, str] = Field(default_factory=dict)
    """The data's column of each part of the layout: {text: review, label: label}."""
    unanswered: bool = False
    """Some training questions have no answer in their context: the run's answer may be that there is none."""
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

    def asked(self) -> dict[str, Any]:
        """The config as it was asked for, before the run changed anything itself."""
        values: dict[str, Any] = json.loads(json.dumps(self.config))
        for name, asked in self.adjusted.items():
            *sections, last = name.split(".")
            inner = values
            for section in sections:
                inner = inner[section]
            inner[last] = asked
        return values

    def write(self, folder: Path) -> None:
        """Writes run.json into `folder`, never half of it."""
        self.save(folder / RECORD_NAME)

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Reads run.json.

        Raises:
            ConfigError: It is missing or damaged.
        """
        path = folder / RECORD_NAME
        if not path.exists():
            raise ConfigError(f"{folder} is no run folder: {RECORD_NAME} is missing there.")
        return cls.open(path)
