"""What of a comparison, and of each of its runs, is in the folder already, and whether it still belongs to it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from siliang.compare.trials import PLACES, run_config
from siliang.config import RunConfig, differences
from siliang.config.comparison import CompareConfig
from siliang.files import remove_stale, remove_tree
from siliang.language import Bilingual, local
from siliang.paths import check_links
from siliang.records import COMPARISON_NAME, RECORD_NAME, Comparison, Record, Trial, metrics_of, plain
from siliang.run_folder import CHECKPOINTS, checkpoints, what_changed
from siliang.types import ConfigError, OutputError, SiliangError

OWN_FILES = r"compare\.yaml|comparison\.json|report\.html"  # that are written beside the runs
MAY_DIFFER = ("methods", "seeds", "search", "output")  # when a comparison is resumed


def open_comparison(config: CompareConfig, folder: Path) -> Comparison:
    """The record of the comparison that was started in a folder, or a new one.

    Raises:
        ConfigError: The folder holds a comparison with other settings.
        OutputError: The folder holds something else.
    """
    path, now, given = folder / COMPARISON_NAME, plain(config.as_dict()), config.as_dict(defaults=False)
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(
                Bilingual(
                    f"output folder {folder} is not empty. Choose another with --output.",
                    f"输出文件夹 {folder} 不是空的。请用 --output 换一个。",
                )
            )
        return Comparison(started_at=datetime.now(UTC).isoformat(timespec="seconds"), config=now, given=given)
    check_links(folder)
    remove_stale(folder, OWN_FILES)
    record = Comparison.open(path)
    for name, (was, wanted) in differences(record.config, now).items():
        if name not in PLACES and name.partition(".")[0] not in MAY_DIFFER:
            raise ConfigError(
                Bilingual(
                    f"{folder} holds a comparison with another {name} ({was}, here {wanted}).\n"
                    "Choose another folder with --output, or take the settings of its compare.yaml.",
                    f"{folder} 中是另一次比较，{name} 不同（原来是 {was}，现在是 {wanted}）。\n"
                    "请用 --output 换一个文件夹，或采用其中 compare.yaml 的设置。",
                )
            )
    record.config, record.given, record.status = now, given, "running"
    return record


def changed_files(config: CompareConfig, folder: Path, record: Comparison) -> Iterator[tuple[type[SiliangError], str]]:
    """Changes of the base model and the data since the comparison was started: an error's class and a sentence
    for each. Runs compare only if all are made on one base model and the same rows."""
    if record.data_files:
        for kind, what, how in what_changed(config.run, record.model_files, record.data_files):
            yield (
                kind,
                Bilingual(
                    f"{what} has changed since {folder} was started: {how}",
                    f"{folder} 开始之后{local(what, 'zh').strip()} 变了：{local(how, 'zh')}",
                ),
            )


def known_trial(trial: Trial, config: CompareConfig, folder: Path, record: Comparison) -> Trial:
    """The trial as it is in the comparison's record; complete only if its run is there, with these settings.

    Raises:
        ConfigError: A run of other settings is there.
    """
    before = next((t for t in record.trials if (t.folder, t.purpose) == (trial.folder, trial.purpose)), trial)
    path = folder / trial.folder
    if before.status not in ("completed", "running") or not (path / RECORD_NAME).is_file():
        return trial if before.status == "completed" else before.model_copy(update={"settings": trial.settings})
    run = Record.read(path)
    if run.status != "completed":
        return before.model_copy(update={"settings": trial.settings})
    for name, (was, wanted) in other_settings(run, run_config(config, trial, folder, record.steps)).items():
        raise ConfigError(
            Bilingual(
                f"{path} is a run with another {name} ({was}, here {wanted}).\n"
                "Remove that folder, choose another with --output, or give the method a label of its own.",
                f"{path} 是另一次运行，{name} 不同（原来是 {was}，现在是 {wanted}）。\n"
                "请删除该文件夹、用 --output 换一个，或给方法另取一个 label。",
            )
        )
    # a run that was complete when the comparison was killed has no metrics in the comparison's record
    metrics = before.metrics or metrics_of(run)
    return before.model_copy(update={"status": "completed", "settings": trial.settings, "metrics": metrics})


def can_resume(config: RunConfig) -> bool:
    """Whether an interrupted run of these settings can be resumed from a checkpoint; if not, its folder is removed."""
    folder = Path(config.output)
    try:
        record = Record.read(folder)
        same = record.status != "completed" and not other_settings(record, config)
    except ConfigError:
        same = False
    if same and checkpoints(folder / CHECKPOINTS):
        return True
    remove_tree(folder)
    return False


def other_settings(record: Record, config: RunConfig) -> dict[str, tuple[object, object]]:
    """The settings in which the run of a record was asked for otherwise than by `config`: what it was, what it is. The
    places of its files do not count: the comparison has looked at the files."""
    found = differences(record.asked(), plain(config.resolved().model_dump(mode="json")))
    return {name: pair for name, pair in found.items() if name not in PLACES}
