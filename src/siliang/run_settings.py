"""The settings of a run that is resumed or used, compared with those that it was started with."""

from __future__ import annotations

from siliang.config import RunConfig, differences
from siliang.language import Bilingual
from siliang.other_names import written
from siliang.records import Record, plain

LENGTH = ("train.epochs", "train.max_steps")
# What may differ when a run is resumed: its length, how often something is done, and how a step uses memory.
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
    "train.keep_frozen",
    "data.workers",
    "accept",
)
FILES = ("model", "revision", "data.train", "data.eval", "adapter", "output")  # compared by what is in them
# What a trained run is used by: of the settings of training, how the rows were split and how it computes
USED_IN_TRAIN = ("train.seed", "train.precision")
HARMLESS = ("data.skip_bad_rows",)  # rows that are bad were left out, or there were none


def as_adjusted(config: RunConfig, record: Record) -> RunConfig:
    """With what the run changed itself, where the settings still ask for what they asked for then."""
    values, was = config.model_dump(mode="json"), record.config
    for name, asked in record.adjusted.items():
        section, _, last = name.partition(".")
        if section == "train" and plain(values[section][last]) == asked:
            values[section][last] = was[section][last]
    return RunConfig.build(values)


def changed_settings(config: RunConfig, record: Record) -> dict[str, tuple[object, object]]:
    """Settings whose value is another now, by dotted name: what it was and what it is. What files and folders are
    called makes no difference, and neither does what the launcher says."""
    found = differences(record.config, plain(config.resolved().model_dump(mode="json")))
    found = {n: pair for n, pair in found.items() if n not in FILES and not n.startswith("distributed")}
    if has_template_file(config) and str(record.config["data"]["template"]).endswith((".yaml", ".yml")):
        found.pop("data.template", None)
    return found


def misplaced_settings(config: RunConfig, record: Record) -> dict[str, tuple[object, object]]:
    """Settings that shaped a trained run (its data, model, method, task) and whose value is another now."""
    found = changed_settings(as_adjusted(config, record), record)
    may = (*MAY_CHANGE, *HARMLESS)
    return {n: v for n, v in found.items() if n not in may and (not n.startswith("train.") or n in USED_IN_TRAIN)}


def has_template_file(config: RunConfig) -> bool:
    """Whether the template is a file, which is recorded with the data."""
    return config.data.template.endswith((".yaml", ".yml"))


def in_words(name: str, values: tuple[object, object]) -> Bilingual:
    """A setting that was changed, and what it was."""
    was, now = map(written, values)
    return Bilingual(f"{name} = {now} (it was {was})", f"{name} = {now}（原来是 {was}）")
