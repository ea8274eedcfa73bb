"""A run's folder: its creation, and its settings."""

from __future__ import annotations

from pathlib import Path

from siliang.config import RunConfig
from siliang.files import write_text
from siliang.language import Bilingual
from siliang.records import RECORD_NAME
from siliang.run_place import CONFIG_NAME, no_run_error
from siliang.safety.safe_yaml import dump_yaml, read_yaml
from siliang.tasks.record import read_record
from siliang.terminal import shell_command
from siliang.types import ConfigError, OutputError


def create_output(folder: Path, *, for_run: bool = False) -> bool:
    """Creates the output folder; returns whether it is new.

    Args:
        for_run: The output is a run; the error for an unfinished run then says how to resume it.

    Raises:
        OutputError: The folder is not empty, or cannot be created.
    """
    try:
        check_empty(folder, for_run=for_run)
        if folder.is_dir():
            return False
        folder.mkdir(parents=True)  # fails if another process has created it meanwhile
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            Bilingual(
                f"output folder {folder} cannot be created: {error.strerror or error}.",
                f"无法建立输出文件夹 {folder}：{error.strerror or error}。",
            )
        ) from None
    return True


def check_empty(folder: Path, *, for_run: bool = False) -> None:
    """Checks that the output folder is empty or missing.

    Raises:
        OutputError: It is not empty. The message says what it holds and what to do.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    status = None
    if (folder / RECORD_NAME).is_file():
        try:
            status = read_record(folder).status
        except ConfigError:
            status = "damaged"
    if status == "completed":
        raise OutputError(
            Bilingual(
                f"output folder {folder} is not empty: it holds a finished run. Choose another with --output.",
                f"输出文件夹 {folder} 不是空的：其中有一次已完成的训练。请用 --output 换一个文件夹。",
            )
        )
    if status and for_run:
        command = shell_command("siliang", "train", "--resume", folder)
        raise OutputError(
            Bilingual(
                f"output folder {folder} is not empty: it holds a run that is not finished. "
                f"Continue it by {command}, or choose another with --output.",
                f"输出文件夹 {folder} 不是空的：其中有一次未完成的训练。"
                f"用 {command} 继续，或用 --output 换一个文件夹。",
            )
        )
    raise OutputError(
        Bilingual(
            f"output folder {folder} is not empty. Choose another with --output.",
            f"输出文件夹 {folder} 不是空的。请用 --output 换一个文件夹。",
        )
    )


def write_config(folder: Path, config: RunConfig) -> None:
    """Writes run.yaml, whole or not at all."""
    write_text(folder / CONFIG_NAME, dump_yaml(config.model_dump(mode="json")))


def read_config(folder: Path) -> RunConfig:
    """The resolved config of a run.

    Raises:
        ConfigError: The folder is not a run.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise no_run_error(folder)
    return RunConfig.build(read_yaml(path), source=str(path))
