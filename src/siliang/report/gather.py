"""Reads the records of runs and comparisons, and groups the runs that differ only by seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from siliang.config import differences
from siliang.config.comparison import CompareConfig
from siliang.language import Bilingual, local
from siliang.paths import check_links, inside
from siliang.records import ANSWERS_NAME, COMPARISON_NAME, RECORD_NAME, Answers, Comparison, Record, Verdict
from siliang.report.agree import Difference, base_differences, differences_of
from siliang.safety.safe_yaml import dump_yaml
from siliang.tasks import TASKS, Task
from siliang.tasks.record import read_record, task_in
from siliang.tasks.verdict import learned_nothing
from siliang.terminal import one_line, shell_command
from siliang.types import ConfigError, TaskType

# Settings that change nothing of what a run has learned, or by which runs of one method are told apart already.
SAME_RESULT = (
    *("train.seed", "data.seed", "data.workers", "train.log_every", "train.trackers", "train.tracker_project"),
    *("train.save_every", "train.save_every_minutes", "train.keep"),
)


@dataclass
class RunResult:
    """One run.

    Attributes:
        record: The record of a finished run; None otherwise.
        error: Why the run failed.
        verdict: Why the run learned nothing.
    """

    folder: Path
    seed: int
    record: Record | None = None
    error: str | None = None
    answers: Answers | None = None
    verdict: Verdict | None = None


@dataclass
class Group:
    """One method with its settings: its runs, one per seed."""

    label: str
    runs: list[RunResult] = field(default_factory=list)

    @property
    def finished(self) -> list[RunResult]:
        """The runs that have metrics."""
        return [run for run in self.runs if run.record is not None]


@dataclass
class ReportData:
    """The input of a report.

    Attributes:
        base: The metrics of the untuned base model, if they were measured.
        base_answers: The answers of the untuned base model.
        settings: The YAML that reproduces the runs.
        all_settings: The same YAML with all defaults; empty for runs, whose settings hold them already.
        command: The command that reproduces the runs.
        folder: The folder of the runs.
        complete: All runs are done.
        is_comparison: The runs were made by `siliang compare`.
        differences: What differs between comparison.json and the records of its runs.
    """

    task: TaskType
    groups: list[Group]
    folder: Path
    settings: str
    command: str
    base: dict[str, float] = field(default_factory=dict)
    base_answers: Answers | None = None
    complete: bool = True
    is_comparison: bool = False
    all_settings: str = ""
    differences: list[Difference] = field(default_factory=list)

    @property
    def records(self) -> list[Record]:
        """The records of all finished runs."""
        return [run.record for group in self.groups for run in group.finished if run.record is not None]

    @property
    def task_row(self) -> Task:
        """The task of the runs, with their settings."""
        record = next(iter(self.records), None)
        return task_in(record) if record is not None else TASKS[self.task]

    @property
    def less_is_better(self) -> set[str]:
        """Of the metrics of lm-eval's tasks, by TASK/METRIC."""
        return {
            f"{task}/{name}"
            for record in self.records
            for task, measured in record.harness.items()
            for name in measured.less_is_better
        }

    @property
    def majority(self) -> float | None:
        """Share of the most frequent class; None if the task has no classes."""
        shares = [run.answers.majority for group in self.groups for run in group.runs if run.answers is not None]
        return next((share for share in shares if share is not None), None)


def gather(folders: list[Path]) -> ReportData:
    """Reads one comparison, or any number of runs on the same task and data. A folder that is given twice counts once.

    Raises:
        ConfigError: A folder holds neither a run nor a comparison, a path in it points outside of it, a record is
            damaged, or the runs have different tasks or held-out rows.
    """
    folders = [*{folder.resolve(): folder for folder in reversed(folders)}.values()][::-1]
    if len(folders) == 1 and (folders[0] / COMPARISON_NAME).is_file():
        return _of_comparison(folders[0])
    if not folders:
        raise ConfigError(
            Bilingual("give at least one folder of a run or a comparison.", "请至少给出一个运行文件夹或比较文件夹。")
        )
    found: list[tuple[str, RunResult]] = []
    for folder in folders:
        if (folder / COMPARISON_NAME).is_file():
            inner = _of_comparison(folder)
            found += [(group.label, run) for group in inner.groups for run in group.runs]
        else:
            if (folder / RECORD_NAME).exists():
                check_links(folder)
            record = read_record(folder)
            found.append((_label(record), _run(folder, record.seed, record, {})))
    found = [*{run.folder.resolve(): (label, run) for label, run in reversed(found)}.values()][::-1]
    records = [run.record for _, run in found if run.record is not None]
    if not records:
        raise ConfigError(
            Bilingual(
                f"{', '.join(map(str, folders))}: no run is finished.",
                f"{'、'.join(map(str, folders))}：没有已完成的运行。",
            )
        )
    first = records[0]
    for record in records:
        for what, a, b in (
            (Bilingual("the task", "任务"), *(TASKS[TaskType(r.config["task"])].title for r in (first, record))),
            (Bilingual("the kind of labels", "标签的种类"), _problem(first), _problem(record)),
            (Bilingual("the held-out rows", "验证集"), _split(first), _split(record)),
        ):
            if a != b:
                raise ConfigError(
                    Bilingual(
                        f"the runs cannot be in one table: they differ in {what} ({a}, {b}).",
                        f"这些运行不能放进同一张表：{local(what, 'zh')}不同（{local(a, 'zh')}；{local(b, 'zh')}）。",
                    )
                )
    paths = shell_command(*folders)
    settings = dump_yaml(first.config)
    return ReportData(
        TaskType(first.config["task"]),
        _grouped(_told_apart(found)),
        folders[0],
        settings,
        f"{shell_command('siliang', 'train', folders[0] / 'run.yaml', '--output', 'NEW_FOLDER')}"
        + (f"   # and the same for each of: {paths}" if len(folders) > 1 else ""),
    )


def _of_comparison(folder: Path) -> ReportData:
    check_links(folder)
    comparison = Comparison.open(folder / COMPARISON_NAME)
    config = CompareConfig.recorded(comparison.config)
    found: list[tuple[str, RunResult]] = []
    differences: list[Difference] = []
    for trial in comparison.trials:
        if trial.purpose != "test":
            continue
        path = inside(folder, trial.folder, source=str(folder / COMPARISON_NAME))
        if trial.status == "completed" and not path.is_dir():
            found.append((trial.method, RunResult(path, trial.seed)))
            differences.append(Difference(trial.method, trial.seed, "folder", in_record=trial.folder))
        elif trial.status == "completed":
            record = read_record(path)
            found.append((trial.method, _run(path, trial.seed, record, comparison.base)))
            differences += differences_of(comparison, config, trial, record)
        else:
            error = trial.error or "not run yet"
            found.append((trial.method, RunResult(path, trial.seed, error=error)))
    base = folder / "base" / ANSWERS_NAME
    answers = Answers.open(base) if base.is_file() else None
    order = [one_line(entry.label) for entry in config.settings.methods]
    return ReportData(
        TaskType(comparison.config["task"]),
        sorted(_grouped(found), key=lambda group: order.index(group.label) if group.label in order else len(order)),
        folder,
        dump_yaml(comparison.given),
        "siliang compare compare.yaml",
        comparison.base,
        answers,
        comparison.status == "completed",
        is_comparison=True,
        all_settings=dump_yaml(comparison.config),
        differences=[*base_differences(comparison, answers), *differences],
    )


def _run(folder: Path, seed: int, record: Record, base: dict[str, float]) -> RunResult:
    if record.status != "completed":
        return RunResult(folder, seed, error=record.error or f"not finished: {record.status}")
    path = folder / ANSWERS_NAME
    answers = Answers.open(path) if path.is_file() else None
    return RunResult(folder, seed, record, None, answers, learned_nothing(task_in(record), record.final, answers, base))


def _grouped(found: list[tuple[str, RunResult]]) -> list[Group]:
    groups: dict[str, Group] = {}
    for label, run in found:
        groups.setdefault(label, Group(one_line(label))).runs.append(run)
    return list(groups.values())


def _told_apart(found: list[tuple[str, RunResult]]) -> list[tuple[str, RunResult]]:
    """The runs, with the settings in their label in which runs of one method differ by more than the seed."""
    by_label: dict[str, list[RunResult]] = {}
    for label, run in found:
        by_label.setdefault(label, []).append(run)
    more: dict[Path, list[str]] = {}
    for runs in by_label.values():
        several = [(run, run.record.asked()) for run in runs if run.record is not None]
        names = {n for _, config in several[1:] for n in differences(several[0][1], config) if not _same_result(n)}
        for run, config in several:
            more[run.folder] = [f"{name}={_value(config, name)}" for name in sorted(names)]
    return [(" ".join([label, *more.get(run.folder, [])]), run) for label, run in found]


def _same_result(name: str) -> bool:
    return name in SAME_RESULT or name.partition(".")[0] in ("output", "accept")


def _value(config: Mapping[str, object], name: str) -> object:
    value: object = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _label(record: Record) -> str:
    method: dict[str, object] = dict(record.config["method"])
    name = str(method.pop("name"))
    return " ".join([name, *(f"{key}={value}" for key, value in method.items() if value is not None)])


def _problem(record: Record) -> str:
    return record.classification.problem if record.classification else ""


def _split(record: Record) -> Bilingual:
    """What determines the held-out rows."""
    data = record.config["data"]
    seed = data["seed"] if data["seed"] is not None else record.seed
    rule = data["eval"] or Bilingual(f"{data['test_size']} with seed {seed}", f"比例 {data['test_size']}，种子 {seed}")
    n = record.rows.eval
    return Bilingual(f"{n} of {data['train']}, {rule}", f"{data['train']} 中的 {n} 条，{local(rule, 'zh')}")
