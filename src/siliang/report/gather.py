"""Reads the records of runs and comparisons, and puts the runs together that differ by their seed alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from siliang.config.comparison import CompareConfig
from siliang.language import Bilingual, local
from siliang.paths import check_links, inside
from siliang.records import ANSWERS_NAME, COMPARISON_NAME, RECORD_NAME, Answers, Comparison, Record, Verdict
from siliang.report.agree import Differs, base_differences, differences_of
from siliang.safety.safe_yaml import dump_yaml
from siliang.tasks.verdict import learned_nothing
from siliang.terminal import one_line, shell_command
from siliang.types import ConfigError, TaskType


@dataclass
class RunFound:
    """One run.

    Attributes:
        record: None where the run failed before it had one, or was not finished.
        error: Why it failed.
        verdict: Why it has learned nothing.
    """

    folder: Path
    seed: int
    record: Record | None = None
    error: str | None = None
    answers: Answers | None = None
    verdict: Verdict | None = None


@dataclass
class Group:
    """A method with its settings, once for each seed."""

    label: str
    runs: list[RunFound] = field(default_factory=list)

    @property
    def finished(self) -> list[RunFound]:
        """The runs that have figures."""
        return [run for run in self.runs if run.record is not None]


@dataclass
class Material:
    """All that a report is made of.

    Attributes:
        base: The untuned model's metrics, where measured.
        base_answers: And what it says.
        settings: The yaml that makes the same again.
        all_settings: The same with all defaults, where that is more.
        command: That makes it.
        folder: Where the runs are.
        complete: Nothing is left to be run.
        is_comparison: The runs were made by `siliang compare`.
        differing: Where the comparison's own file and its runs' records do not say the same.
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
    differing: list[Differs] = field(default_factory=list)

    @property
    def records(self) -> list[Record]:
        """Of all finished runs."""
        return [run.record for group in self.groups for run in group.finished if run.record is not None]

    @property
    def majority(self) -> float | None:
        """Share of the most frequent class, where the task has classes."""
        found = [run.answers.majority for group in self.groups for run in group.runs if run.answers is not None]
        return next((share for share in found if share is not None), None)


def gather(folders: list[Path]) -> Material:
    """What the folders hold: one comparison, or any number of runs on the same task and data.

    Raises:
        ConfigError: A folder holds neither, a path in it leads out, its records are damaged, or they do not belong
            together.
    """
    if len(folders) == 1 and (folders[0] / COMPARISON_NAME).is_file():
        return _of_comparison(folders[0])
    if not folders:
        raise ConfigError(
            Bilingual("name at least one run's folder, or a comparison's.", "请至少给出一个运行文件夹或比较文件夹。")
        )
    found: list[tuple[str, RunFound]] = []
    for folder in folders:
        if (folder / COMPARISON_NAME).is_file():
            inner = _of_comparison(folder)
            found += [(group.label, run) for group in inner.groups for run in group.runs]
        else:
            if (folder / RECORD_NAME).exists():
                check_links(folder)
            record = Record.read(folder)
            found.append((_label(record), _run(folder, record.seed, record, {})))
    records = [run.record for _, run in found if run.record is not None]
    if not records:
        raise ConfigError(
            Bilingual(
                f"{', '.join(map(str, folders))}: none of the runs was finished.",
                f"{'、'.join(map(str, folders))}：没有一次运行已完成。",
            )
        )
    first = records[0]
    for record in records:
        for what, a, b in (
            ("task", first.config["task"], record.config["task"]),
            ("held-out rows", _split(first), _split(record)),
        ):
            if a != b:
                raise ConfigError(
                    Bilingual(
                        f"the runs do not belong into one table: their {what} differ ({a}, {b}).",
                        f"这些运行不能放进同一张表：它们的{local(what, 'zh')}不同（{a}，{b}）。",
                    )
                )
    paths = shell_command(*folders)
    settings = dump_yaml(first.config)
    return Material(
        TaskType(first.config["task"]),
        _grouped(found),
        folders[0],
        settings,
        f"{shell_command('siliang', 'train', folders[0] / 'run.yaml', '--output', 'NEW_FOLDER')}"
        + (f"   # and so for each of: {paths}" if len(folders) > 1 else ""),
    )


def _of_comparison(folder: Path) -> Material:
    check_links(folder)
    comparison = Comparison.open(folder / COMPARISON_NAME)
    config = CompareConfig.recorded(comparison.config)
    found: list[tuple[str, RunFound]] = []
    differing: list[Differs] = []
    for trial in comparison.trials:
        if trial.purpose != "test":
            continue
        path = inside(folder, trial.folder, source=str(folder / COMPARISON_NAME))
        if trial.status == "completed" and not path.is_dir():
            found.append((trial.method, RunFound(path, trial.seed)))
            differing.append(Differs(trial.method, trial.seed, "folder", there=trial.folder))
        elif trial.status == "completed":
            record = Record.read(path)
            found.append((trial.method, _run(path, trial.seed, record, comparison.base)))
            differing += differences_of(comparison, config, trial, record)
        else:
            error = trial.error or "not run yet"
            found.append((trial.method, RunFound(path, trial.seed, error=error)))
    base = folder / "base" / ANSWERS_NAME
    answers = Answers.open(base) if base.is_file() else None
    order = [one_line(entry.label) for entry in config.settings.methods]
    return Material(
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
        differing=[*base_differences(comparison, answers), *differing],
    )


def _run(folder: Path, seed: int, record: Record, base: dict[str, float]) -> RunFound:
    if record.status != "completed":
        return RunFound(folder, seed, error=record.error or f"not finished: {record.status}")
    path = folder / ANSWERS_NAME
    answers = Answers.open(path) if path.is_file() else None
    task = TaskType(record.config["task"])
    return RunFound(folder, seed, record, None, answers, learned_nothing(task, record.final, answers, base))


def _grouped(found: list[tuple[str, RunFound]]) -> list[Group]:
    groups: dict[str, Group] = {}
    for label, run in found:
        groups.setdefault(label, Group(one_line(label))).runs.append(run)
    return list(groups.values())


def _label(record: Record) -> str:
    method: dict[str, object] = dict(record.config["method"])
    name = str(method.pop("name"))
    return " ".join([name, *(f"{key}={value}" for key, value in method.items() if value is not None)])


def _split(record: Record) -> str:
    """What decides which rows are held out."""
    data = record.config["data"]
    seed = data["seed"] if data["seed"] is not None else record.seed
    rule = data["eval"] or f"{data['test_size']} with seed {seed}"
    return f"{record.rows.eval} of {data['train']}, {rule}"
