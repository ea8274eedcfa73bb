"""Where what was computed once is kept: a folder by content, with what was not used for a month thrown away."""

from __future__ import annotations

import os
import time
from pathlib import Path

KEEP_DAYS = 30


def cache_folder() -> Path:
    """SILIANG_CACHE, or siliang's folder in the user's cache; made where it is not there."""
    named = os.environ.get("SILIANG_CACHE")
    home = os.environ.get("XDG_CACHE_HOME")
    folder = Path(named).expanduser() if named else (Path(home) if home else Path.home() / ".cache") / "siliang"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def prune(folder: Path) -> None:
    """Removes the files of `folder` that nobody has used for a month."""
    limit = time.time() - KEEP_DAYS * 86400
    for path in folder.iterdir():
        try:
            if path.is_file() and path.stat().st_mtime < limit:
                path.unlink()
        except OSError:  # another process was quicker, or owns it
            continue
