"""The schema of run.json. Every run writes one, and reports read it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from siliang.config import LAYOUT_NAMES, RunConfig, Seed, differences
from siliang.language import Bilingual
from siliang.records.classes import Classification, ClassReport
from siliang.records.harness import HarnessTask
from siliang.records.kept_weights import KeptWeights
from siliang.records.metrics import Metrics
from siliang.records.saved import Count, Date, Name, Number, Part, Positive, Rate, Saved, Sha256
from siliang.secrets import HIDDEN, short_repr, shortened
from siliang.types import ConfigError

SCHEMA_VERSION = 1
RECORD_NAME = "run.json"
SHOWN = 80  # characters of a value in an error


@dataclass(frozen=True)
class Predicted:
    """What a plan predicts for a run.

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


class Device(Part):
    """Where the run computed."""

    kind: str
    """cpu, cuda or mps."""
    name: str
    """The processor's or card's name."""
    threads: Count
    """CPU threads that torch used."""
    memory_bytes: Count
    """The device's memory, all of it."""


class Counts(Part):
    """Parameters."""

    trained: Count
    total: Count
    """Of the model that was there, adapters and copied heads included."""
    adapter_bytes: Count = 0
    """Size of the saved adapter (or model, for full fine-tuning) on disk."""


class Rows(Part):
    """The data as it was used."""

    train: Count
    eval: Count
    skipped: list[str] = Field(default_factory=list)
    """Rows left out: file, line and reason."""
    truncated: Count = 0
    """Training rows that were cut to max_length."""


class Seconds(Part):
    """Wall-clock time."""

    load: Positive = 0.0
    """Data and model, up to the first step."""
    train: Positive = 0.0
    """All steps, with the evaluations and checkpoints between them."""
    steps: Positive = 0.0
    """The steps alone; 0 where it was not measured."""
    eval: Positive = 0.0
    """The evaluation at the end."""


class Memory(Part):
    """Peak memory: of the device with CUDA, else resident memory of the process."""

    loading_bytes: Count = 0
    """The most while the model was loaded and prepared."""
    loaded_bytes: Count = 0
    """Before the first step."""
    kept_weights: KeptWeights | None = None
    """The frozen weights that were not converted to fp32; None if all were loaded in one format."""
    steps_bytes: Count = 0
    """The most during the steps and evaluations."""
    peak_bytes: Count = 0
    """The most from before the model was loaded to the last evaluation: the larger of both."""
    peak_bytes_by_rank: list[Count] = Field(default_factory=list)
    """Of each process, where there were several; peak_bytes is the most."""
    predicted_bytes: Count | None = None
    """The peak that was planned; None where there was no plan."""
    predicted_loading_bytes: Count | None = None
    """The same for loading alone."""
    recomputed_layers: Count = 0
    """The most layers that recomputed their activations in a batch."""
    predicted_parts: dict[Name, Count] = Field(default_factory=dict, max_length=100)
    """The parts of the steps' peak: weights, trained, gradients, optimizer, activations, logits, workspace, and the
    memory besides the tensors (overhead)."""

    @property
    def above_bytes(self) -> int:
        """What the steps took above the loaded model."""
        return (self.steps_bytes or self.peak_bytes) - self.loaded_bytes


class StepMetrics(Part):
    """One line of the log."""

    step: Count
    epoch: Positive
    loss: Number | None = None
    """Mean training loss since the line before, without the steps that were left out (train.on_nan)."""
    eval_loss: Number | None = None
    metrics: Metrics = Field(default_factory=dict)
    """The other metrics of an evaluation on the held-out rows: accuracy, f1, ... train.best may choose by them."""
    learning_rate: Rate | None = None
    grad_norm: Number | None = None
    tokens_per_s: Number | None = None


class File(Part):
    """A file, or a folder of files, that a run read."""

    path: str
    sha256: Sha256


class Learned(Part):
    """What the adapter's initialization was learned from, before the first step (LoRA's "eva", "corda", "lora_ga")."""

    start: Name
    """The initialization."""
    rows: Count
    """Of the training data, each as often as it was read."""
    tokens: Count
    seconds: Positive


class Record(Saved):
    """run.json."""

    newest: ClassVar[int] = SCHEMA_VERSION

    schema_version: Annotated[int, Field(ge=1)] = SCHEMA_VERSION
    status: Literal["running", "completed", "interrupted", "failed"] = "running"
    error: str | None = None
    started_at: Date
    """UTC, ISO 8601."""
    config: dict[str, Any]
    """The resolved config: what was really used. Names of files and folders are absolute."""
    adjusted: dict[str, Any] = Field(default_factory=dict)
    """Settings that the run changed itself (train.fit, the strategy of several devices), by their dotted names, as they
    were asked for."""
    changed: list[str] = Field(default_factory=list)
    """Settings that were changed between two parts of the run: from which step on, what, and what it was."""
    seed: Seed
    versions: dict[Name, Name]
    device: Device
    precision: Literal["fp32", "bf16", "fp16", "pure-bf16", "pure-fp16"]
    """What was really used."""
    learning_rate: Rate
    """What was really used."""
    model_sha256: Sha256
    """Over the base model's weight files."""
    model_files: dict[Name, Sha256] = Field(default_factory=dict)
    """The SHA-256 of each file of the base model: weights, configs, tokenizer. Empty where there are none here."""
    data_sha256: Sha256
    """Over the data files."""
    data_files: list[File] = Field(default_factory=list)
    """The same for each source, those held out behind those trained on; and for a template that is a file."""
    code_sha256: Sha256 | None = None
    """Over the folder of a model whose own code ran (SECURITY.md). It says what ran, and allows nothing."""
    adapter_sha256: Sha256 | None = None
    """Over the adapter whose weights the training began with (`adapter` in the config)."""
    labels: list[str] | None = None
    layout: str = ""
    """How the rows were laid out: a name that data.layout knows."""
    columns: dict[Name, Name] = Field(default_factory=dict)
    """The data's column of each part of the layout: {text: review, label: label}."""
    more_layouts: dict[Name, dict[Name, Name]] = Field(default_factory=dict)
    """The same of sources that were laid out in another way: their layouts, with the columns of each."""
    classification: Classification | None = None
    """How labels were read and are predicted, for classes and numbers of whole rows."""
    class_report: ClassReport | None = None
    """The held-out rows at the end, by class."""
    unanswered: bool = False
    """Some training questions have no answer in their context: the run's answer may be that there is none."""
    parameters: Counts
    learned: Learned | None = None
    rows: Rows
    seconds: Seconds = Field(default_factory=Seconds)
    tokens_trained: Count = 0
    """Tokens that went through the model in training, padding left out."""
    memory: Memory = Field(default_factory=Memory)
    steps: list[StepMetrics] = Field(default_factory=list)
    passed_over: list[Count] = Field(default_factory=list)
    """Steps that were not made because their loss or gradient was no number (train.on_nan)."""
    best_step: Count | None = None
    """The step whose weights were saved, where train.best chose."""
    signatures: dict[Name, Name] = Field(default_factory=dict, max_length=100)
    """How each measure of written texts was computed, such as BLEU's signature of sacrebleu."""
    final: Metrics = Field(default_factory=dict)
    """Metrics at the end: eval_loss, accuracy or perplexity, base_eval_loss where measured."""
    harness: dict[Name, HarnessTask] = Field(default_factory=dict, max_length=1000)
    """What `siliang eval --harness` has measured since, by task."""

    def check(self) -> None:
        """The settings are those of a run, and the rest fits them. What a task needs is in tasks/record.py.

        Raises:
            ConfigError: It does not.
        """
        whole_config = RunConfig.recorded(self.config).model_dump(mode="json")
        for name, (was, whole) in differences(self.config, whole_config).items():
            if HIDDEN not in str(was):  # a secret, for which the name was looked up here
                raise ConfigError(
                    Bilingual(
                        f"config.{name} = {short_repr(was)}: a record has it as {short_repr(whole)}.",
                        f"config.{name} = {short_repr(was)}：记录中应为 {short_repr(whole)}。",
                    )
                )
        for name, asked in self.adjusted.items():
            if "." not in name or name not in _names(self.config):
                raise ConfigError(
                    Bilingual(
                        f"adjusted: {shortened(name, SHOWN)!r} is not a setting.",
                        f"adjusted：{shortened(name, SHOWN)!r} 不是设置。",
                    )
                )
            RunConfig.recorded(_with(self.config, name, asked))
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ConfigError(Bilingual("labels holds a name twice.", "labels 中有重复的名称。"))
        for name in (self.layout, *self.more_layouts):
            if name and name not in LAYOUT_NAMES:
                raise ConfigError(
                    Bilingual(
                        f"layout = {shortened(name, SHOWN)!r}: must be one of {', '.join(LAYOUT_NAMES)}.",
                        f"layout = {shortened(name, SHOWN)!r}：只能是 {'、'.join(LAYOUT_NAMES)} 之一。",
                    )
                )
        if self.parameters.trained > self.parameters.total:
            raise ConfigError(
                Bilingual(
                    f"parameters.trained = {self.parameters.trained:,}: must be at most the total, "
                    f"{self.parameters.total:,}.",
                    f"parameters.trained = {self.parameters.trained:,}：不能超过总数 {self.parameters.total:,}。",
                )
            )
        for name, found in (("steps", [line.step for line in self.steps]), ("passed_over", self.passed_over)):
            if found != sorted(found):
                raise ConfigError(
                    Bilingual(f"{name} must be in order, the first step first.", f"{name} 应按步数从小到大排列。")
                )

    @property
    def layouts(self) -> dict[str, dict[str, str]]:
        """All layouts of the rows, with the columns of each."""
        return {**({self.layout: self.columns} if self.layout else {}), **self.more_layouts}

    @property
    def of_texts(self) -> bool:
        """All rows were plain texts: what the model is given is continued as it is, without a template."""
        return [*self.layouts] == ["text"]

    def asked(self) -> dict[str, Any]:
        """The config as it was asked for, before the run changed anything itself."""
        values = self.config
        for name, asked in self.adjusted.items():
            values = _with(values, name, asked)
        return values

    def write(self, folder: Path) -> None:
        """Writes run.json into `folder`, never half of it."""
        self.save(folder / RECORD_NAME)

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Reads run.json.

        Raises:
            ConfigError: It is missing.
            RecordError: It is damaged.
        """
        path = folder / RECORD_NAME
        if not path.exists():
            raise ConfigError(
                Bilingual(
                    f"{folder} is not a run's folder: it has no {RECORD_NAME}.",
                    f"{folder} 不是运行文件夹：其中没有 {RECORD_NAME}。",
                )
            )
        return cls.open(path)


def _names(values: dict[str, Any], before: str = "") -> Iterator[str]:
    """The dotted names of all settings."""
    for key, value in values.items():
        yield f"{before}{key}"
        if isinstance(value, dict):
            yield from _names(value, f"{before}{key}.")


def _with(values: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The settings with another value of one, by its dotted name."""
    changed = copy.deepcopy(values)
    *sections, last = name.split(".")
    inner = changed
    for section in sections:
        inner = inner[section]
    inner[last] = value
    return changed
