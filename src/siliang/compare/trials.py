"""The trials of a comparison, and the config of each. `siliang train` with this config gives the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from siliang.config import RunConfig
from siliang.config.comparison import CompareConfig, MethodEntry, slug
from siliang.methods import find_method
from siliang.records import Trial

RUNS, SEARCH = "runs", "search"  # subfolders of the comparison
SAVE_MINUTES = 5.0  # default interval of checkpoints in a comparison
MAX_ATTEMPTS = 3  # for a trial that kills its process or the comparison
PATH_SETTINGS = ("model", "data.train", "data.eval", "output")  # their files may have been moved
TIMED_STEPS = 9  # steps that measure the speed of a method; the first half is warm-up


def search_trials(config: CompareConfig) -> list[Trial]:
    """The trials of the search, with the first seed."""
    return [
        Trial(
            method=entry.label,
            seed=config.seeds[0],
            purpose="search",
            settings=settings,
            folder=f"{SEARCH}/{slug(entry.label)}/{i + 1}",
        )
        for entry in config.settings.methods
        for i, settings in enumerate(config.settings.choices(entry))
    ]


def test_trials(config: CompareConfig, chosen: dict[str, dict[str, Any]]) -> list[Trial]:
    """The trials of the table, seed by seed, so that the table is complete after the first seed. Full fine-tuning is
    the last one of each seed: it changes the base model, which is then loaded again."""
    entries = sorted(config.settings.methods, key=lambda entry: find_method(entry.name).config is None)
    return [
        Trial(
            method=entry.label,
            seed=seed,
            purpose="test",
            settings=chosen.get(entry.label, {}),
            folder=f"{RUNS}/{slug(entry.label)}/seed-{seed}",
        )
        for seed in config.seeds
        for entry in entries
    ]


def run_config(config: CompareConfig, trial: Trial, folder: Path, steps: dict[str, int]) -> RunConfig:
    """The config of the trial's run.

    Args:
        folder: The folder of the comparison.
        steps: With a budget in minutes, the steps of each method.
    """
    entry = find_entry(config, trial.method)
    values = config.run.model_dump(mode="json")
    settings = dict(trial.settings)
    rate = settings.pop("learning_rate", None) or entry.learning_rate or config.run.train.learning_rate
    values["method"] = {"name": entry.name, **entry.arguments, **settings}
    values["train"] |= {"seed": trial.seed, "learning_rate": rate}
    if not config.run.train.saves:
        values["train"]["save_every_minutes"] = SAVE_MINUTES  # to resume a killed comparison
    if trial.method in steps:
        values["train"]["max_steps"] = steps[trial.method]
    data: dict[str, Any] = values["data"]
    if data["seed"] is None:
        data["seed"] = config.run.train.seed  # all seeds have the same split
    if trial.purpose == "search":
        data["validation_size"] = config.settings.validation_size
    values["output"] = str(folder / trial.folder)
    return RunConfig.build(values, source=f"{trial.method}, seed {trial.seed}")


def find_entry(config: CompareConfig, label: str) -> MethodEntry:
    """The method with this label."""
    return next(entry for entry in config.settings.methods if entry.label == label)
