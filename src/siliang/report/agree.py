"""Checks comparison.json against the records of its runs: one of them may have been changed after it was written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from siliang.config import MethodConfig
from siliang.config.comparison import CompareConfig
from siliang.language import Bilingual, local
from siliang.records import Answers, Comparison, Record, Trial, metrics_of
from siliang.secrets import shortened
from siliang.types import ConfigError, first_line

# Settings that affect the metrics, and that are the same in a comparison and in all of its runs.
SETTINGS = {
    "data": ("test_size", "validation_size", "seed", "stratify", "max_length", "max_target_length"),
    "train": ("epochs", "max_steps", "batch_size", "gradient_accumulation", "schedule", "weight_decay"),
}


@dataclass(frozen=True)
class Difference:
    """A value that differs between comparison.json and the record of a run.

    Attributes:
        label: The label of the method; None for the base model.
        field: The metric or setting (report/words.py has `field_` + its name); "folder" for a missing run folder.
        in_comparison: The value in comparison.json; None if it has none.
        in_record: The value in the run's record.
    """

    label: str | None
    seed: int | None
    field: str
    in_comparison: object = None
    in_record: object = None


def differences_of(comparison: Comparison, config: CompareConfig, trial: Trial, record: Record) -> list[Difference]:
    """The differences between a finished trial and the record in its folder. Metrics are compared unrounded.

    Args:
        config: The comparison's settings, read once for all of its trials.

    Raises:
        ConfigError: The method settings of the trial or of the record are not valid.
    """
    return [
        Difference(trial.method, trial.seed, *found) for found in _unequal_fields(comparison, config, trial, record)
    ]


def base_differences(comparison: Comparison, answers: Answers | None) -> list[Difference]:
    """The differences between the base model's metrics in comparison.json and in its answers file."""
    if answers is None:
        return []
    pairs = ((name, comparison.base.get(name), metric) for name, metric in answers.metrics.items())
    return [Difference(None, None, name, a, b) for name, a, b in pairs if not _equal(a, b)]


def _unequal_fields(
    comparison: Comparison, config: CompareConfig, trial: Trial, record: Record
) -> Iterator[tuple[str, object, object]]:
    entry = next(entry for entry in config.settings.methods if entry.label == trial.method)
    settings = dict(trial.settings)
    rate = settings.pop("learning_rate", None) or entry.learning_rate or config.run.train.learning_rate
    expected = _method({**entry.arguments, **settings, "name": entry.name}, f"comparison.json: {trial.method}")
    recorded = _method(record.config["method"], f"{trial.folder}: run.json")
    yield from _unequal("task", str(config.run.task), str(record.config["task"]))
    yield from _unequal("method", _method_text(expected), _method_text(recorded))
    yield from _unequal("seed", trial.seed, record.seed)
    yield from _unequal("seed", trial.seed, record.config["train"]["seed"])
    settings_of_all, settings_of_run = config.run.model_dump(mode="json"), record.asked()
    if settings_of_all["data"]["seed"] is None:
        settings_of_all["data"]["seed"] = settings_of_all["train"]["seed"]  # all seeds have the same split
    if trial.method in comparison.steps:
        settings_of_all["train"]["max_steps"] = comparison.steps[trial.method]
    for section, names in SETTINGS.items():
        for name in names:
            yield from _unequal(f"{section}.{name}", settings_of_all[section][name], settings_of_run[section][name])
    if rate is not None:
        yield from _unequal("learning_rate", rate, record.learning_rate)
    if comparison.data_files:
        yield from _unequal("data", _hashes(comparison), _hashes(record))
    if comparison.model_files:
        yield from _unequal("model", sorted(comparison.model_files.items()), sorted(record.model_files.items()))
    now = metrics_of(record)
    for name in dict.fromkeys((*now, *trial.metrics)):
        yield from _unequal(name, trial.metrics.get(name), now.get(name))


def _method(values: dict[str, object], source: str) -> MethodConfig:
    """
    Raises:
        ConfigError: The values are not valid method settings.
    """
    try:
        return MethodConfig.model_validate(values)
    except ValidationError as error:
        inner = error.errors()[0].get("ctx", {}).get("error")
        reason = shortened(first_line(str(inner if isinstance(inner, ConfigError) else error.errors()[0]["msg"])), 300)
        raise ConfigError(Bilingual(f"{source}: {reason}", f"{source}：{local(reason, 'zh')}")) from None


def _unequal(field: str, in_comparison: object, in_record: object) -> Iterator[tuple[str, object, object]]:
    if not _equal(in_comparison, in_record):
        # a list of hashes is too long to show
        yield (field, None, None) if isinstance(in_comparison, list) else (field, in_comparison, in_record)


def _equal(a: object, b: object) -> bool:
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return both_nan or a == b


def _method_text(method: MethodConfig) -> str:
    """A method and its settings, without the paths of its files, which may differ."""
    given = dict(sorted(method.with_files(lambda _: None).items()))
    return " ".join([method.name, *(f"{key}={value}" for key, value in given.items() if value is not None)])


def _hashes(record: Comparison | Record) -> list[str]:
    return [file.sha256 for file in record.data_files]
