"""The schema of comparison.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from siliang.config import Seed
from siliang.config.comparison import CompareConfig
from siliang.language import Bilingual
from siliang.paths import inside
from siliang.records.metrics import Metrics
from siliang.records.run import File, Record
from siliang.records.saved import Date, Name, Part, Saved, Sha256
from siliang.secrets import shortened
from siliang.types import ConfigError, RecordError

COMPARISON_NAME = "comparison.json"
SCHEMA_VERSION = 1


class Trial(Part):
    """One run of the comparison: a method, its settings, a seed."""

    method: Name
    """The method's label."""
    seed: Seed
    purpose: Literal["search", "test"]
    """search: to choose settings, on the validation rows. test: for the table, on the held-out rows."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The values from the search: learning_rate, or fields of the method's config."""
    folder: Name
    """The run's folder, seen from the comparison's."""
    status: Literal["waiting", "running", "completed", "failed"] = "waiting"
    error: str | None = None
    attempts: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """How often it was started: more than once if the comparison was interrupted."""
    metrics: Metrics = Field(default_factory=dict)
    """The values of `metrics_of` when the run was completed. The report checks that its record still agrees."""


def metrics_of(record: Record) -> dict[str, float]:
    """What a comparison keeps of a run's record: its final metrics, parameters, memory and seconds."""
    return {
        **record.final,
        "trained": record.parameters.trained,
        "total": record.parameters.total,
        "adapter_bytes": record.parameters.adapter_bytes,
        "peak_bytes": record.memory.peak_bytes,
        "train_s": record.seconds.train,
        "eval_s": record.seconds.eval,
        "tokens_trained": record.tokens_trained,
    }


class Comparison(Saved):
    """comparison.json."""

    newest: ClassVar[int] = SCHEMA_VERSION

    schema_version: Annotated[int, Field(ge=1)] = SCHEMA_VERSION
    status: Literal["running", "completed"] = "running"
    started_at: Date
    """UTC, ISO 8601."""
    config: dict[str, Any]
    """The resolved compare.yaml."""
    given: dict[str, Any]
    """The same without values that equal their default."""
    model_files: dict[Name, Sha256] = Field(default_factory=dict)
    """The SHA-256 of each file of the base model."""
    data_files: list[File] = Field(default_factory=list)
    """The SHA-256 of each source of the data."""
    base: Metrics = Field(default_factory=dict)
    """Metrics of the untuned base model on the held-out rows; empty if it has no head for the task."""
    steps: dict[Name, Annotated[int, Field(ge=1, lt=2**31)]] = Field(default_factory=dict)
    """With a budget in minutes: the steps of each method that fit into it."""
    chosen: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    """The settings that the search found best for each method."""
    trials: list[Trial] = Field(default_factory=list)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Reads the file; the folders of its runs lie inside of the comparison's.

        Raises:
            ConfigError, RecordError: As of every record.
        """
        found = super().open(path)
        for trial in found.trials:
            inside(path.parent, trial.folder, kind=RecordError, source=str(path))
        return found

    def check(self) -> None:
        """The settings are those of a comparison, and its runs have a folder each.

        Raises:
            ConfigError: They are not.
        """
        config = CompareConfig.recorded(self.config)
        labels = {entry.label for entry in config.settings.methods}
        folders = [trial.folder for trial in self.trials]
        if twice := next((name for name in folders if folders.count(name) > 1), None):
            raise ConfigError(
                Bilingual(
                    f"trials: the folder {shortened(twice, 80)!r} appears twice.",
                    f"trials：文件夹 {shortened(twice, 80)!r} 出现了两次。",
                )
            )
        tested = [trial.method for trial in self.trials if trial.purpose == "test"]
        if (unknown := next((label for label in tested if label not in labels), None)) is not None:
            raise ConfigError(
                Bilingual(
                    f"trials: {shortened(unknown, 80)!r} is not one of the methods: {', '.join(sorted(labels))}.",
                    f"trials：{shortened(unknown, 80)!r} 不是其中的方法：{'、'.join(sorted(labels))}。",
                )
            )
        if "eval_loss" in self.base and "perplexity" not in self.base:
            raise ConfigError(Bilingual("base.perplexity is missing.", "缺少 base.perplexity。"))
