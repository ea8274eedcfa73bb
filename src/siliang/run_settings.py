"""Compares the settings of a run that is resumed or used with those of its start."""

from __future__ import annotations

from siliang.config import RunConfig, differences
from siliang.data.templates import is_file
from siliang.language import Bilingual
from siliang.other_names import written
from siliang.records import Record, plain

LENGTH = ("train.epochs", "train.max_steps")
# Settings that may change when a run is resumed: its length, intervals, and memory use.
MAY_CHANGE = (
    *LENGTH,
    "train.log_every",
    "train.trackers",
    "train.tracker_project",
    "train.eval_every",
    "train.save_every",
    "train.save_every_minutes",
    "train.keep",
    "train.max_time",
    "train.on_nan",
    "train.patience",
    "train.fit",
    "train.memory_budget",
    "train.gradient_checkpointing",
    "train.tokens_at_once",
    "train.packing",
    "train.share_beginnings",
    "train.frozen_weights",
    "train.keep_frozen",
    "data.workers",
    "accept",
)
FILES = ("model", "revision", "data.train", "data.eval", "adapter", "output")  # compared by their content
# Settings of training that also matter for a trained run: the split of the rows, and the precision
USED_IN_TRAIN = ("train.seed", "train.precision")
HARMLESS = ("data.skip_bad_rows",)  # bad rows were skipped, or there were none


def as_adjusted(config: RunConfig, record: Record) -> RunConfig:
    """The config with the run's own adjustments, of settings that still have the values that the user gave then."""
    values, used = config.model_dump(mode="json"), record.config
    for name, given in record.adjusted.items():
        section, _, last = name.partition(".")
        if section in ("train", "data") and plain(values[section][last]) == given:
            values[section][last] = used[section][last]
    section = values["classification"] or {"problem": "auto"}
    if used.get("classification") and section["problem"] == "auto":  # as the data was read then
        found = {name: used["classification"][name] for name in ("problem", "label_separator")}
        values["classification"] = section | found
    return RunConfig.build(values)


def changed_settings(config: RunConfig, record: Record) -> dict[str, tuple[object, object]]:
    """Changed settings by dotted name: (old value, new value). Names of files and folders, and the launcher's settings,
    do not count."""
    changed = differences(record.config, plain(config.resolved().model_dump(mode="json")))
    changed = {n: pair for n, pair in changed.items() if n not in FILES and not n.startswith("distributed")}
    if has_template_file(config) and is_file(str(record.config["data"]["template"])):
        changed.pop("data.template", None)
    return changed


def misplaced_settings(config: RunConfig, record: Record) -> dict[str, tuple[object, object]]:
    """Changed settings that determine a trained run: its data, model, method and task."""
    changed = changed_settings(as_adjusted(config, record), record)
    allowed = (*MAY_CHANGE, *HARMLESS)
    return {n: v for n, v in changed.items() if n not in allowed and (not n.startswith("train.") or n in USED_IN_TRAIN)}


def has_template_file(config: RunConfig) -> bool:
    """Whether the template is a file; a template file is recorded with the data."""
    return is_file(config.data.template)


def in_words(name: str, values: tuple[object, object]) -> Bilingual:
    """A changed setting: its new and its old value."""
    old, new = map(written, values)
    return Bilingual(f"{name} = {new} (it was {old})", f"{name} = {new}（原来是 {old}）")
