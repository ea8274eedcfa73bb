"""The names in a run's folder, and the run of a folder, which may be that of a checkpoint or an adapter.

Imports neither torch nor transformers, so that a wrong folder is refused quickly.
"""

from __future__ import annotations

import re
from pathlib import Path

from siliang.language import Bilingual, local
from siliang.paths import is_real_folder
from siliang.records import COMPARISON_NAME
from siliang.types import ADAPTER_CONFIG, ConfigError

CONFIG_NAME = "run.yaml"
ADAPTER = "adapter"  # the trained adapter
MODEL = "model"  # the trained model, for full fine-tuning
CHECKPOINTS = "checkpoints"
TRACKERS = "trackers"  # what experiment trackers write (train/tracking.py)
MODEL_CONFIG = "config.json"  # of a model of transformers
PREFIX = "checkpoint-"  # followed by the step


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in `folder` by their step, the oldest first."""
    folders = (p for p in folder.glob(f"{PREFIX}*") if is_real_folder(p))
    named = {p: re.fullmatch(rf"{PREFIX}([0-9]{{1,15}})", p.name) for p in folders}
    return dict(sorted((int(match[1]), path) for path, match in named.items() if match))


def find_place(folder: Path) -> tuple[Path, Path | None]:
    """The run of a folder: the run's own folder, or that of a checkpoint, its adapter or its model.

    Returns:
        The run's folder; and the given folder, unless it is the run's.

    Raises:
        ConfigError: The folder is none of these.
    """
    place = folder.absolute()
    if (folder / CONFIG_NAME).is_file():
        return folder, None
    if place.parent.name == CHECKPOINTS and (place.parent.parent / CONFIG_NAME).is_file() and place.is_dir():
        return place.parent.parent, folder
    if place.name in (ADAPTER, MODEL) and (place.parent / CONFIG_NAME).is_file() and place.is_dir():
        return place.parent, folder
    raise no_run_error(folder)


def is_model_alone(folder: Path) -> bool:
    """Whether the folder holds a model or an adapter that is no run's."""
    try:
        find_place(folder)
    except ConfigError:
        return any((folder / name).is_file() for name in (ADAPTER_CONFIG, MODEL_CONFIG))
    return False


def no_run_error(folder: Path) -> ConfigError:
    """The error for a folder that is not a run's."""
    hint = _hint(folder)
    return ConfigError(
        Bilingual(
            f"{folder} is not a run's folder: it has no {CONFIG_NAME}.{hint}",
            f"{folder} 不是运行文件夹：其中没有 {CONFIG_NAME}。{local(hint, 'zh')}",
        )
    )


def _hint(folder: Path) -> str:
    """Says what a folder is that is not a run's, and what to name instead."""
    if not folder.exists():
        others = [p.name for p in checkpoints(folder.parent).values()] if folder.parent.name == CHECKPOINTS else []
        names = ", ".join(others)
        missing = Bilingual(" There is no such folder.", "这个文件夹不存在。")
        return Bilingual(f" There is {names}.", f"那里有 {names}。") if others else missing
    if (folder / COMPARISON_NAME).is_file():
        run = next((p.parent for p in sorted(folder.glob(f"runs/*/*/{CONFIG_NAME}"))), folder / "runs" / "...")
        return f" It holds a comparison: name one of its runs, such as {run}."
    if (folder / ADAPTER_CONFIG).is_file():
        return Bilingual(
            " It holds an adapter alone: generate and chat take one that writes; others are trained further with "
            "siliang train --adapter, and the new run is used.",
            "其中只有一个适配器：generate 和 chat 可以使用生成文本的适配器；其他适配器请用 siliang train --adapter "
            "继续训练，再使用新的运行。",
        )
    if folder.name == CHECKPOINTS and (found := checkpoints(folder)):
        return f" Name one of its checkpoints, such as {list(found.values())[-1]}."
    return ""
