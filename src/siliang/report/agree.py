"""Whether a comparison's own file and the records of its runs say the same: either may have been changed since."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from siliang.config import METHOD_FOLDERS, MethodConfig
from siliang.config.comparison import CompareConfig
from siliang.language import Bilingual, local
from siliang.records import Answers, Comparison, Record, Trial, metrics_of
from siliang.secrets import shortened
from siliang.types import ConfigError, first_line

# Settings that all runs of a comparison have as it has them, and that metrics hang on.
SETTINGS = {
    "data": ("test_size", "validation_size", "seed", "stratify", "max_length", "max_target_length"),
    "train": ("epochs", "max_steps", "batch_size", "gradient_accumulation", "schedule", "weight_decay"),
}


@dataclass(frozen=True)
class Differs:
    """What a comparison and one of its runs say otherwise.

    Attributes:
        label: The method's; None for the base.
        what: The metric, a word of report/words.py behind `field_`; "folder" for a run that is not there.
        here: What comparison.json says; None for nothing.
        there: What the run's record says.
    """

    label: str | None
    seed: int | None
    what: str
    here: object = None
    there: object = None


def differences_of(comparison: Comparison, config: CompareConfig, trial: Trial, record: Record) -> list[Differs]:
    """In what a finished trial and the record in its folder differ; metrics are compared as they are written.

    Args:
        config: The comparison's settings, read once for all of its trials.

    Raises:
        ConfigError: The settings of one are those of no method.
    """
    return [Differs(trial.method, trial.seed, *found) for found in _found(comparison, config, trial, record)]


def base_differences(comparison: Comparison, answers: Answers | None) -> list[Differs]:
    """In what the base model's metrics and its answers' file differ."""
    if answers is None:
        return []
    pairs = ((name, comparison.base.get(name), metric) for name, metric in answers.metrics.items())
    return [Differs(None, None, name, here, there) for name, here, there in pairs if not _same(here, there)]


def _found(
    comparison: Comparison, config: CompareConfig, trial: Trial, record: Record
) -> Iterator[tuple[str, object, object]]:
    entry = next(entry for entry in config.settings.methods if entry.label == trial.method)
    settings = dict(trial.settings)
    rate = settings.pop("learning_rate", None) or entry.learning_rate or config.run.train.learning_rate
    method = _method({**entry.arguments, **settings, "name": entry.name}, f"comparison.json: {trial.method}")
    there = _method(record.config["method"], f"{trial.folder}: run.json")
    yield from _unequal("task", str(config.run.task), str(record.config["task"]))
    yield from _unequal("method", _in_words(method), _in_words(there))
    yield from _unequal("seed", trial.seed, record.seed)
    yield from _unequal("seed", trial.seed, record.config["train"]["seed"])
    here, asked = config.run.model_dump(mode="json"), record.asked()
    if here["data"]["seed"] is None:
        here["data"]["seed"] = here["train"]["seed"]  # the split is the same for all seeds
    if trial.method in comparison.steps:
        here["train"]["max_steps"] = comparison.steps[trial.method]
    for section, names in SETTINGS.items():
        for name in names:
            yield from _unequal(f"{section}.{name}", here[section][name], asked[section][name])
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
        ConfigError: They are not the settings of a method.
    """
    try:
        return MethodConfig.model_validate(values)
    except ValidationError as error:
        inner = error.errors()[0].get("ctx", {}).get("error")
        said = inner if isinstance(inner, ConfigError) else error.errors()[0]["msg"]
        raise ConfigError(
            Bilingual(
                f"{source}: {shortened(first_line(str(said)), 300)}",
                f"{source}：{local(shortened(first_line(str(said)), 300), 'zh')}",
            )
        ) from None


def _unequal(what: str, here: object, there: object) -> Iterator[tuple[str, object, object]]:
    if not _same(here, there):
        # of many hashes, that they differ is all there is to say
        yield (what, None, None) if isinstance(here, list) else (what, here, there)


def _same(a: object, b: object) -> bool:
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return both_nan or a == b


def _in_words(method: MethodConfig) -> str:
    """A method and its settings. Where its files lie makes no difference."""
    given = {key: value for key, value in sorted(method.arguments.items()) if key not in METHOD_FOLDERS}
    return " ".join([method.name, *(f"{key}={value}" for key, value in given.items() if value is not None)])


def _hashes(found: Comparison | Record) -> list[str]:
    return [file.sha256 for file in found.data_files]
