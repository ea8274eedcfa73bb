"""Where what was computed once is kept: a folder by content, with what was not used for a month thrown away."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from siliang.language import Bilingual
from siliang.types import ConfigError

KEEP_DAYS = 30


def cache_folder() -> Path:
    """SILIANG_CACHE, or siliang's folder in the user's cache; made where it is not there.

    Raises:
        ConfigError: There is a file of that name.
    """
    named = os.environ.get("SILIANG_CACHE")
    home = os.environ.get("XDG_CACHE_HOME")
    folder = Path(named).expanduser() if named else (Path(home) if home else Path.home() / ".cache") / "siliang"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ConfigError(
            Bilingual(
                f"{folder} is a file, and siliang needs a folder there: set SILIANG_CACHE to a folder.",
                f"{folder} 是文件，而 siliang 需要在这里建立文件夹：请把 SILIANG_CACHE 设为文件夹。",
            )
        ) from None
    return folder


def used(folder: Path, name: str) -> None:
    """Notes that the entries whose names begin so are used now: `prune` looks at the time of the last use."""
    for path in folder.glob(f"{name}*"):
        try:
            os.utime(path)
        except OSError:  # another user's: it stays as old as it is
            continue


def prune(folder: Path, prefix: str = "") -> None:
    """Removes what nobody has used for a month: the files of `folder`, or, with a prefix, the folders named so."""
    limit = time.time() - KEEP_DAYS * 86400
    for path in folder.glob(f"{prefix}*"):
        try:
            if path.stat().st_mtime >= limit:
                continue
            if prefix and path.is_dir():
                shutil.rmtree(path)
            elif not prefix and path.is_file():
                path.unlink()
        except OSError:  # another process was quicker, or owns it
            continue
