"""What is where in a run's folder, and who may write into it."""

from __future__ import annotations

import re
from pathlib import Path

from siliang.config import RunConfig
from siliang.files import write_text
from siliang.language import Bilingual, local
from siliang.methods.config import CONFIG_NAME as ADAPTER_CONFIG
from siliang.paths import is_real_folder
from siliang.records import COMPARISON_NAME, RECORD_NAME, Record
from siliang.safety.safe_yaml import dump_yaml, read_yaml
from siliang.terminal import shell_command
from siliang.types import ConfigError, OutputError

CONFIG_NAME = "run.yaml"
ADAPTER = "adapter"  # the trained adapter
MODEL = "model"  # the trained model, for full fine-tuning
CHECKPOINTS = "checkpoints"
TRACKERS = "trackers"  # what experiment trackers write (train/tracking.py)
PREFIX = "checkpoint-"  # and the step


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in `folder` by their step, the oldest first."""
    found = (p for p in folder.glob(f"{PREFIX}*") if is_real_folder(p))
    named = {p: re.fullmatch(rf"{PREFIX}([0-9]{{1,15}})", p.name) for p in found}
    return dict(sorted((int(found[1]), path) for path, found in named.items() if found))


def create_output(folder: Path, *, for_run: bool = False) -> bool:
    """Makes the output folder; returns whether it was new.

    Args:
        for_run: A run is to be trained into it, which may be there already.

    Raises:
        OutputError: Something is there already, or the folder cannot be made.
    """
    try:
        check_empty(folder, for_run=for_run)
        if folder.is_dir():
            return False
        folder.mkdir(parents=True)  # another process may be quicker: then this fails
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            Bilingual(
                f"output folder {folder} cannot be made: {error.strerror or error}.",
                f"无法建立输出文件夹 {folder}：{error.strerror or error}。",
            )
        ) from None
    return True


def check_empty(folder: Path, *, for_run: bool = False) -> None:
    """Nothing is in the output folder.

    Raises:
        OutputError: Something is: what it is, and what can be done.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    status = None
    if (folder / RECORD_NAME).is_file():
        try:
            status = Record.read(folder).status
        except ConfigError:
            status = "damaged"
    if status == "completed":
        raise OutputError(
            Bilingual(
                f"output folder {folder} is not empty: it holds a finished run. Choose another with --output.",
                f"输出目录 {folder} 不是空的：其中有一次已完成的训练。请用 --output 换一个目录。",
            )
        )
    if status and for_run:
        command = shell_command("siliang", "train", "--resume", folder)
        raise OutputError(
            Bilingual(
                f"output folder {folder} is not empty: it holds a run that is not finished. "
                f"Continue it by {command}, or choose another with --output.",
                f"输出目录 {folder} 不是空的：其中有一次未完成的训练。用 {command} 继续，或用 --output 换一个目录。",
            )
        )
    raise OutputError(
        Bilingual(
            f"output folder {folder} is not empty. Choose another with --output.",
            f"输出目录 {folder} 不是空的。请用 --output 换一个目录。",
        )
    )


def write_config(folder: Path, config: RunConfig) -> None:
    """Writes run.yaml, never half of it."""
    write_text(folder / CONFIG_NAME, dump_yaml(config.model_dump(mode="json")))


def read_config(folder: Path) -> RunConfig:
    """The resolved config of a run.

    Raises:
        ConfigError: The folder is not a run.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        what = _what_else(folder)
        raise ConfigError(
            Bilingual(
                f"{folder} is not a run's folder: it has no {CONFIG_NAME}.{what}",
                f"{folder} 不是训练目录：其中没有 {CONFIG_NAME}。{local(what, 'zh')}",
            )
        )
    return RunConfig.build(read_yaml(path), source=str(path))


def _what_else(folder: Path) -> str:
    """Describes a folder that is not a run's."""
    if not folder.exists():
        others = [p.name for p in checkpoints(folder.parent).values()] if folder.parent.name == CHECKPOINTS else []
        names = ", ".join(others)
        missing = Bilingual(" There is no such folder.", "这个文件夹不存在。")
        return Bilingual(f" There is {names}.", f"那里有 {names}。") if others else missing
    if (folder / COMPARISON_NAME).is_file():
        run = next((p.parent for p in sorted(folder.glob(f"runs/*/*/{CONFIG_NAME}"))), folder / "runs" / "...")
        return f" It holds a comparison: name one of its runs, such as {run}."
    if (folder / ADAPTER_CONFIG).is_file():
        return " It holds an adapter alone: train it further with siliang train --adapter, and use that run."
    if folder.name == CHECKPOINTS and (found := checkpoints(folder)):
        return f" Name one of its checkpoints, such as {list(found.values())[-1]}."
    return ""
