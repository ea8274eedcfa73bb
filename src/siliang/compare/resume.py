"""Resuming a comparison: which of its runs are finished, and whether the settings and files are unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from siliang.compare.trials import PATH_SETTINGS, run_config
from siliang.config import RunConfig, differences
from siliang.config.comparison import CompareConfig
from siliang.files import remove_stale, remove_tree
from siliang.language import Bilingual, local
from siliang.paths import check_links
from siliang.records import COMPARISON_NAME, RECORD_NAME, Comparison, Record, Trial, metrics_of, plain
from siliang.run_folder import CHECKPOINTS, checkpoints, what_changed
from siliang.tasks.record import read_record
from siliang.types import ConfigError, OutputError, SiliangError

OWN_FILES = r"compare\.yaml|comparison\.json|report\.html"  # files of the comparison's folder, next to the runs
MAY_CHANGE = ("methods", "seeds", "search", "output")  # settings that may change when a comparison is resumed


def open_comparison(config: CompareConfig, folder: Path) -> Comparison:
    """Opens the record of the comparison in a folder, or makes a new one.

    Raises:
        ConfigError: The folder holds a comparison with other settings.
        OutputError: The folder holds something else.
    """
    path, now, given = folder / COMPARISON_NAME, plain(config.as_dict()), config.as_dict(defaults=False)
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(
                Bilingual(
                    f"output folder {folder} is not empty. Choose another folder with --output.",
                    f"输出文件夹 {folder} 不是空的。请用 --output 换一个。",
                )
            )
        return Comparison(started_at=datetime.now(UTC).isoformat(timespec="seconds"), config=now, given=given)
    check_links(folder)
    remove_stale(folder, OWN_FILES)
    record = Comparison.open(path)
    for name, (was, wanted) in differences(record.config, now).items():
        if name not in PATH_SETTINGS and name.partition(".")[0] not in MAY_CHANGE:
            raise ConfigError(
                Bilingual(
                    f"{folder} holds a comparison with another {name} ({was}, here {wanted}).\n"
                    "Choose another folder with --output, or use the settings of its compare.yaml.",
                    f"{folder} 中是另一次比较，{name} 不同（原来是 {was}，现在是 {wanted}）。\n"
                    "请用 --output 换一个文件夹，或采用其中 compare.yaml 的设置。",
                )
            )
    record.config, record.given, record.status = now, given, "running"
    return record


def changed_files(config: CompareConfig, folder: Path, record: Comparison) -> Iterator[tuple[type[SiliangError], str]]:
    """Changes of the base model and the data since the comparison was started: (error class, message) of each. Runs
    can only be compared if they use the same base model and the same rows."""
    if record.data_files:
        for kind, what, how in what_changed(config.run, record.model_files, record.data_files):
            yield (
                kind,
                Bilingual(
                    f"{what} has changed since {folder} was started: {how}",
                    f"{folder} 开始之后{local(what, 'zh').strip()} 变了：{local(how, 'zh')}",
                ),
            )


def recorded_trial(trial: Trial, config: CompareConfig, folder: Path, record: Comparison) -> Trial:
    """The trial with its status from the record. It is completed only if its run exists and has these settings.

    Raises:
        ConfigError: A run with other settings is in its folder.
    """
    before = next((t for t in record.trials if (t.folder, t.purpose) == (trial.folder, trial.purpose)), trial)
    path = folder / trial.folder
    if before.status not in ("completed", "running") or not (path / RECORD_NAME).is_file():
        return trial if before.status == "completed" else before.model_copy(update={"settings": trial.settings})
    run = read_record(path)
    if run.status != "completed":
        return before.model_copy(update={"settings": trial.settings})
    for name, (was, wanted) in changed_settings(run, run_config(config, trial, folder, record.steps)).items():
        raise ConfigError(
            Bilingual(
                f"{path} is a run with another {name} ({was}, here {wanted}).\n"
                "Remove that folder, choose another with --output, or give the method another label.",
                f"{path} 是另一次运行，{name} 不同（原来是 {was}，现在是 {wanted}）。\n"
                "请删除该文件夹、用 --output 换一个，或给方法另取一个 label。",
            )
        )
    # if the comparison was killed just after a run was completed, its record has no metrics of that run
    metrics = before.metrics or metrics_of(run)
    return before.model_copy(update={"status": "completed", "settings": trial.settings, "metrics": metrics})


def can_resume(config: RunConfig) -> bool:
    """Whether an interrupted run with these settings can resume from a checkpoint. If not, its folder is removed."""
    folder = Path(config.output)
    try:
        record = read_record(folder)
        same = record.status != "completed" and not changed_settings(record, config)
    except ConfigError:
        same = False
    if same and checkpoints(folder / CHECKPOINTS):
        return True
    remove_tree(folder)
    return False


def changed_settings(record: Record, config: RunConfig) -> dict[str, tuple[object, object]]:
    """The settings of a recorded run that differ from those of `config`: name to (recorded, now). Paths are ignored:
    `changed_files` compares the files themselves."""
    changed = differences(record.asked(), plain(config.resolved().model_dump(mode="json")))
    return {name: pair for name, pair in changed.items() if name not in PATH_SETTINGS}
