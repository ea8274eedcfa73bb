"""The memory overhead of earlier runs on this machine, which is more accurate than a constant."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from statistics import median

from siliang.data.cache import cache_folder
from siliang.files import append
from siliang.hardware import versions
from siliang.safety.safe_json import JsonError, parse_json

FILE = "memory.jsonl"
LATEST = 20  # runs that count
MOST_BYTES = 2**50


def record_work(device_name: str, work_bytes: int) -> None:
    """Stores the overhead of a finished run: its memory less the process's memory before, less the planned tensors.

    Does nothing if the disk is full or read-only.
    """
    line = _key(device_name) | {"work_bytes": work_bytes}
    with suppress(OSError):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with append(path) as file:
            file.write(f"{json.dumps(line)}\n".encode())


def known_work(device_name: str) -> int | None:
    """The median overhead of the latest runs on this device with these versions, in bytes; None without any."""
    key, known = _key(device_name), []
    try:
        lines = _path().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for line in lines:
        with suppress(JsonError):
            row = parse_json(line)
            work_bytes = row.pop("work_bytes", None) if isinstance(row, dict) else None
            if row == key and type(work_bytes) is int and work_bytes < MOST_BYTES:
                known.append(max(work_bytes, 0))
    return int(median(known[-LATEST:])) if known else None


def _key(device_name: str) -> dict[str, str]:
    here = versions()
    return {"device": device_name, "siliang": here["siliang"], "torch": here["torch"]}


def _path() -> Path:
    return cache_folder() / FILE
