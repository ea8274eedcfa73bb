"""The trials of a comparison, and the config of each: `siliang train` with it gives the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from siliang.config import RunConfig
from siliang.config.comparison import CompareConfig, MethodEntry, slug
from siliang.records import Trial

RUNS, SEARCH = "runs", "search"  # folders within the comparison's
SAVE_MINUTES = 5.0
MOST_ATTEMPTS = 3  # of a trial that takes its process, or the whole comparison, down with it
PLACES = ("model", "data.train", "data.eval", "output")  # files of another name may be the same files
TIMED_STEPS = 9  # by which a method's speed is measured; the first half is warm-up


def search_trials(config: CompareConfig) -> list[Trial]:
    """The trials that settings are chosen by, with the first seed."""
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
    """The trials of the table, seed by seed, so that the table is whole after the first seed. Of each seed full tuning
    comes last: it changes the base model, which then has to be loaded again."""
    entries = sorted(config.settings.methods, key=lambda entry: entry.name == "full")
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
    """The trial as a run of its own.

    Args:
        folder: The comparison's.
        steps: With a budget in minutes: each method's steps.
    """
    entry = find_entry(config, trial.method)
    values = config.run.model_dump(mode="json")
    settings = dict(trial.settings)
    rate = settings.pop("learning_rate", None) or entry.learning_rate or config.run.train.learning_rate
    values["method"] = {"name": entry.name, **entry.arguments, **settings}
    values["train"] |= {"seed": trial.seed, "learning_rate": rate}
    if not config.run.train.saves:
        values["train"]["save_every_minutes"] = SAVE_MINUTES  # a comparison that is killed is resumed from there
    if trial.method in steps:
        values["train"]["max_steps"] = steps[trial.method]
    data: dict[str, Any] = values["data"]
    if data["seed"] is None:
        data["seed"] = config.run.train.seed  # the split is the same for all seeds
    if trial.purpose == "search":
        data["validation_size"] = config.settings.validation_size
    values["output"] = str(folder / trial.folder)
    return RunConfig.build(values, source=f"{trial.method}, seed {trial.seed}")


def find_entry(config: CompareConfig, label: str) -> MethodEntry:
    """The method of that label."""
    return next(entry for entry in config.settings.methods if entry.label == label)
