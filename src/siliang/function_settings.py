"""What functions.py takes and returns: settings in several forms, and the results."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from siliang.config import RunConfig, Source
from siliang.function_arguments import as_path
from siliang.language import Bilingual
from siliang.paths import check_links
from siliang.run_place import CONFIG_NAME
from siliang.safety.safe_yaml import read_yaml
from siliang.types import ConfigError

if TYPE_CHECKING:  # slow to import
    from siliang.check import Finding
    from siliang.records import Comparison, Record
    from siliang.report.summary import MethodSummary, Recommendation

Settings = RunConfig | Mapping[str, object] | str | os.PathLike[str]


@dataclass(frozen=True)
class CheckResult:
    """What `check` found.

    Attributes:
        findings: Errors and warnings, each with a code, its rows, the cause and what to do.
        counts: Rows and tokens: what `siliang check --json` calls counts.
    """

    findings: list[Finding]
    counts: Mapping[str, object]

    @property
    def ok(self) -> bool:
        """Whether a run can start: there are no errors."""
        return all(finding.severity != "error" for finding in self.findings)


@dataclass(frozen=True)
class TrainingResult:
    """A finished run.

    Attributes:
        folder: The run's folder, which the other functions take.
        record: Its run.json.
        verdict: Why the run has learned nothing; None if it has, or if that cannot be seen.
    """

    folder: Path
    record: Record
    verdict: str | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the held-out rows at the end."""
        return dict(self.record.final)


@dataclass(frozen=True)
class ComparisonResult:
    """A finished comparison.

    Attributes:
        folder: The comparison's folder.
        record: Its comparison.json.
        methods: A summary of each method: the mean metrics over seeds, memory and time.
        recommendation: The best method, those tied with it, and a much smaller one that is nearly as good.
        page: The page of the report.
    """

    folder: Path
    record: Comparison
    methods: list[MethodSummary]
    recommendation: Recommendation
    page: Path


def run_config(settings: Settings | None = None, **changes: object) -> RunConfig:
    """The settings of a run: those given, with changes.

    Args:
        settings: None: the changes alone.
        changes: Settings by name. A mapping changes some settings of a section, `data="a.csv"` means data.train, and
            `method="lora"` replaces the method.

    Raises:
        ConfigError: A setting is unknown or missing, or has a value that is not allowed.

    Example:
        >>> run_config(model="bert", task="seq_cls", data="a.csv", output="run").train.batch_size
        16
    """
    from siliang.train.start_adapter import filled_in

    if isinstance(settings, RunConfig) and not changes:
        return settings
    return RunConfig.build(filled_in(values_of(settings, changes)), source=source_of(settings))


def of_folder(
    settings: Settings | None, changes: dict[str, object], *, resume: bool
) -> tuple[Settings | None, dict[str, object]]:
    """The settings and changes of a run that is resumed, where its folder is given in the place of settings.

    Raises:
        ConfigError: A folder is given, and is no run's, or another `output` is, or nothing is to be resumed.
    """
    if not isinstance(settings, str | os.PathLike) or not (folder := Path(os.fsdecode(settings))).is_dir():
        return settings, changes
    if not resume:
        raise ConfigError(
            Bilingual(
                f"{folder} is a folder: give a settings file, or resume=True to continue the run in it.",
                f"{folder} 是文件夹：请给出配置文件，或用 resume=True 继续其中的训练。",
            )
        )
    if not (own := folder / CONFIG_NAME).is_file():
        raise ConfigError(
            Bilingual(
                f"{folder} is not a run's folder: it has no {CONFIG_NAME}, so resume=True cannot continue it.",
                f"{folder} 不是运行文件夹：其中没有 {CONFIG_NAME}，无法用 resume=True 继续。",
            )
        )
    check_links(folder)
    output = changes.get("output", folder)
    if not isinstance(output, str | os.PathLike) or Path(os.fsdecode(output)).absolute() != folder.absolute():
        raise ConfigError(
            Bilingual(
                f"resume=True continues in {folder}: leave out output = {output}.",
                f"resume=True 在 {folder} 中继续训练：请去掉 output = {output}。",
            )
        )
    return own, changes | {"output": str(folder)}


def values_of(settings: Settings | None, changes: Mapping[str, object]) -> dict[str, object]:
    """The settings with changes, not yet checked."""
    if isinstance(settings, RunConfig):
        values: dict[str, object] = settings.model_dump(mode="json", exclude_unset=True)
    elif isinstance(settings, Mapping):
        values = {name: _section(name, value) for name, value in settings.items()}
    elif settings is None:
        values = {}
    else:
        what = Bilingual("the path of a run.yaml, a mapping, or a RunConfig", "run.yaml 的路径、映射或 RunConfig")
        values = read_yaml(Path(as_path(settings, "settings", what)))
    for name, change in changes.items():
        change = os.fspath(change) if isinstance(change, os.PathLike) else change
        before = _section(name, values.get(name))
        if name == "data":
            change = _section(name, change)
        if isinstance(change, Mapping) and isinstance(before, Mapping):
            change = {**before, **change}
        values[name] = dict(change) if isinstance(change, Mapping) else change
    return values


def _section(name: str, value: object) -> object:
    """A section that is written as its one value: `method: ia3`, `data: a.csv`."""
    alone = {"data": "train", "method": "name"}.get(name)
    # one source, with its weight
    if name == "data" and isinstance(value, Mapping) and "path" in value and {*value} <= {*Source.model_fields}:
        return {"train": [value]}
    return value if alone is None or value is None or isinstance(value, Mapping) else {alone: value}


def source_of(settings: Settings | None) -> str:
    """Where settings come from, for errors."""
    return os.fspath(settings) if isinstance(settings, str | os.PathLike) else Bilingual("the settings", "配置项")
