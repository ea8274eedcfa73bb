"""What the labels of a run are, where its settings leave that to the data; and what weighs its classes."""

from __future__ import annotations

from siliang.config import ClassificationConfig, RunConfig
from siliang.data.infer_problem import first_label_cells, look_at, separator
from siliang.data.tokens import TokenSet
from siliang.language import Bilingual
from siliang.records import Classification
from siliang.tasks.task import Task
from siliang.types import ConfigError


def settle(task: Task, config: RunConfig) -> tuple[RunConfig, str]:
    """The settings with what the labels of the training rows look like, and why they were taken for that.

    Raises:
        DataError: The data cannot be read.
        ConfigError: A setting is not for what the labels are.
    """
    section = config.classification or ClassificationConfig()
    if section.problem != "auto" and (section.problem != "several_labels" or section.label_separator != "auto"):
        return config, ""
    if config.data.streaming and not config.data.labels:
        return config, ""  # which is refused, by what a stream cannot give
    cells = list(first_label_cells(config.data, task.data))
    found: dict[str, object] = {}
    why = ""
    if section.problem == "auto":
        look = look_at(cells, config.data.labels)
        found, why = {"problem": look.problem, "label_separator": look.separator}, look.why
        if section.label_separator != "auto":  # which is for several labels alone
            found = {"problem": "several_labels"}
            why = Bilingual("classification.label_separator is set", "设置了 classification.label_separator")
    else:
        texts = {cell for cell in cells if isinstance(cell, str)}
        found = {"label_separator": separator(texts, config.data.labels)}
    if found.get("problem") in ("one_label", "number"):
        found["label_separator"] = "auto"
    values = config.model_dump(mode="json")
    values["classification"] = section.model_dump(mode="json") | found
    return RunConfig.build(values), why


def begin(
    task: Task, config: RunConfig, why: str, labels: list[str] | None, train: TokenSet, held_out: int
) -> Classification | None:
    """What the record says of the labels before the training; None for a task without such labels.

    Args:
        task: With the run's settings.
        why: The labels were taken for what the settings say.
        held_out: Rows.

    Raises:
        ConfigError: A weight is for no class, or there are no rows to choose a threshold or a temperature on.
    """
    section = config.classification
    if task.labels is None or section is None or section.problem == "auto":
        return None
    chooses = [n for n, on in (("calibrate", section.calibrate), ("threshold", section.threshold == "auto")) if on]
    if chooses and not held_out:
        raise ConfigError(
            Bilingual(
                f"classification.{chooses[0]} needs held-out rows: give data.eval, data.test_size or "
                "data.validation_size.",
                f"classification.{chooses[0]} 需要验证集：请设置 data.eval、data.test_size 或 data.validation_size。",
            )
        )
    if config.data.streaming and section.class_weights == "balanced":
        raise ConfigError(
            Bilingual(
                "classification.class_weights = balanced counts all training rows, which data.streaming does not read: "
                "give {label: weight}.",
                "classification.class_weights = balanced 要统计全部训练样本，而 data.streaming 不会先读完：请给出 "
                "{label: weight}。",
            )
        )
    weights: list[float] | None = None
    names = labels or []
    if section.class_weights == "balanced" and task.labels.weights is not None:
        weights = task.labels.weights(train, len(names))
    elif isinstance(section.class_weights, dict):
        if unknown := [name for name in section.class_weights if name not in names]:
            raise ConfigError(
                Bilingual(
                    f"classification.class_weights has {unknown[0]!r}, which is no label; the labels are "
                    f"{', '.join(names[:20])}.",
                    f"classification.class_weights 中的 {unknown[0]!r} 不是标签；标签有 {'、'.join(names[:20])}。",
                )
            )
        weights = [section.class_weights.get(name, 1.0) for name in names]
    chosen_on = None if not chooses else "held_out" if config.data.validation_size is None else "validation"
    return Classification(problem=section.problem, why=why, class_weights=weights, chosen_on=chosen_on)
