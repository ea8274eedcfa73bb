"""The checks before a run is resumed: its settings, base model and data are unchanged, or a change is allowed, printed
and recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from siliang.config import RunConfig
from siliang.files import find_damage, remove_stale
from siliang.language import Bilingual, both, local
from siliang.paths import check_links
from siliang.records import RECORD_NAME, Record
from siliang.run_folder import ADAPTER, CHECKPOINTS, CONFIG_NAME, MODEL, what_changed
from siliang.run_settings import LENGTH, MAY_CHANGE, as_adjusted, changed_settings, in_words
from siliang.tasks.record import read_record
from siliang.terminal import shell_command
from siliang.train.saving import last_good
from siliang.train.start_adapter import find_start_adapter
from siliang.types import AdapterError, ConfigError, ModelError, RecordError

OWN_NAMES = r"run\.yaml|run\.json|answers\.json|adapter|model"  # that a run writes


@dataclass(frozen=True)
class Resumed:
    """A run that is resumed.

    Attributes:
        config: Its settings, with the run's own adjustments.
        record: The last one written; None if it is missing or damaged.
        checkpoint: The last undamaged one; None if the run starts again.
        changed: Settings and files that have changed since, one line each.
        finished: Nothing is left to do.
    """

    config: RunConfig
    record: Record | None
    checkpoint: Path | None
    changed: list[str]
    finished: bool = False


def check_resumed(config: RunConfig, folder: Path, say: Callable[[str], None], *, force: bool) -> Resumed:
    """Checks that the run in `folder` can be resumed with the settings of `config`.

    Raises:
        ConfigError: `folder` is not a run, a link in it leads out, or a setting has changed that has already shaped the
            run.
        ModelError: The base model is gone, or another by now, and `force` is off.
        DataError: The data has changed, and `force` is off.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise ConfigError(
            Bilingual(
                f"{folder} is not a run's folder, so there is nothing to resume: leave out --resume to start a run.",
                f"{folder} 不是运行文件夹，没有可以继续的训练：去掉 --resume 即可从头开始。",
            )
        )
    check_links(folder)
    remove_stale(folder, OWN_NAMES)
    record = _read(folder, say)
    found: dict[str, tuple[object, object]] = {}
    if record is not None:
        config = as_adjusted(config, record)
        found = changed_settings(config, record)
        _check_settings(found, folder)
    checkpoint = last_good(folder / CHECKPOINTS, lambda line: say(both("warning    ", "警告       ") + local(line)))
    whole = next(
        (part for part in (ADAPTER, MODEL) if (folder / part).is_dir() and find_damage(folder / part) is None), None
    )
    finished = record is not None and record.status == "completed" and whole is not None
    if finished and not any(name in found for name in LENGTH):
        if found:
            raise ConfigError(
                Bilingual(
                    f"{folder} is finished: {in_words(*next(iter(found.items())))} has no effect.\n"
                    f"Train it further in a new run: {_further(folder)}",
                    f"{folder} 已训练完：{in_words(*next(iter(found.items()))).zh} 不再起作用。\n"
                    f"请作为新的运行继续训练：{_further(folder)}",
                )
            )
        return Resumed(config, record, None, [], finished=True)
    forced: list[str] = []
    if record is not None:
        forced = _check_files(config, record, folder, say, force=force)
        if checkpoint is None and config.adapter and find_start_adapter(config.adapter).sha256 != record.adapter_sha256:
            raise AdapterError(
                Bilingual(
                    f"{config.adapter} is another adapter than the one that {folder} started from: put it back.",
                    f"{config.adapter} 不是 {folder} 开始时用的适配器：请放回原来的。",
                )
            )
    if checkpoint is None and finished:
        raise ConfigError(
            Bilingual(
                f"{folder} is finished, and none of its checkpoints is left to resume from: "
                f"{in_words(*next(iter(found.items())))} cannot take effect.\n"
                f"Train it further in a new run: {_further(folder)}",
                f"{folder} 已训练完，也没有可续训的检查点："
                f"{in_words(*next(iter(found.items()))).zh} 无法生效。\n"
                f"请作为新的运行继续训练：{_further(folder)}",
            )
        )
    if checkpoint is None:
        say(
            both(
                "begins     no checkpoint was saved to resume from: the run starts again from its first step",
                "从头开始   没有可以恢复的检查点：从第一步重新开始训练",
            )
        )
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    if (most := config.train.max_steps) is not None and most < step:
        raise ConfigError(
            Bilingual(
                f"train.max_steps = {most:,}, and {checkpoint} has made {step:,} steps already.",
                f"train.max_steps = {most:,}，而 {checkpoint} 已训练 {step:,} 步。",
            )
        )
    for name, values in found.items():
        change, first = in_words(name, values), step + 1
        say(both(f"changed    {change}, from step {first:,} on", f"设置改变   {change.zh}，从第 {first:,} 步起"))
    words = [*(in_words(name, values) for name, values in found.items()), *forced]
    changed = [f"from step {step + 1:,} on: {what}" for what in words]
    return Resumed(config, record, checkpoint, changed)


def _read(folder: Path, say: Callable[[str], None]) -> Record | None:
    try:
        return read_record(folder)
    except ConfigError as error:
        if isinstance(error, RecordError) and error.later:
            raise
        path = folder / RECORD_NAME
        what = Bilingual("damaged", "已损坏") if path.exists() else Bilingual("missing", "不存在")
        say(
            both(
                f"warning    {path} is {what}: cannot check whether settings or data have changed",
                f"警告       {path} {what.zh}：无法检查设置或数据是否变过",
            )
        )
        return None


def _check_settings(found: dict[str, tuple[object, object]], folder: Path) -> None:
    for name, values in found.items():
        if name not in MAY_CHANGE:
            raise ConfigError(
                Bilingual(
                    f"{folder} was started with another setting: {in_words(name, values)}. A resumed run keeps it.\n"
                    f"Restore it, or train the adapter further in a new run: {_further(folder)}",
                    f"{folder} 开始训练时用的是另一个设置：{in_words(name, values).zh}。续训须保持原来的设置。"
                    "\n"
                    f"请改回，或作为新的运行继续训练：{_further(folder)}",
                )
            )


def _further(folder: Path) -> str:
    return f"siliang train ... {shell_command('--adapter', folder)}"


def _check_files(
    config: RunConfig, record: Record, folder: Path, say: Callable[[str], None], *, force: bool
) -> list[str]:
    """The changes of the base model and the data since the run started, which `force` allows."""
    model = config.model
    if Path(model).is_absolute() and not Path(model).is_dir():
        raise ModelError(
            Bilingual(
                f"The base model of {folder} is missing: {model}. Give its present place with --model FOLDER_OR_NAME.",
                f"{folder} 的基座模型已不在原处：{model}。请用 --model 指明它的文件夹或名称。",
            )
        )
    forced = []
    for kind, what, how in what_changed(config, record.model_files, record.data_files):
        if not force:
            raise kind(
                Bilingual(
                    f"{what[0].upper()}{what[1:]} has changed since the run started: {how}.\n"
                    "Restore it, or continue with the changed files by --force: the result will differ.",
                    f"{local(what, 'zh')}在训练开始之后变过：{local(how, 'zh')}。\n"
                    "请恢复原样，或加 --force 用改过的文件继续训练：结果会与原来不同。",
                )
            )
        say(
            both(
                f"warning    {what} has changed since the run started: {how}. The run continues, with another result",
                f"警告       {local(what)} 在训练开始之后变过：{local(how)}。训练会继续，但结果与原来不同",
            )
        )
        forced.append(f"{what} has changed: {how}")
    return forced
