"""What runs on this machine took beside their tensors: better known, after a few, than any constant."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from statistics import median

from siliang.data.cache import cache_folder
from siliang.hardware import versions
from siliang.plan.record import MethodPlan
from siliang.record import Record

FILE = "memory.jsonl"
LATEST = 20  # runs that count


def remember(plan: MethodPlan, record: Record) -> None:
    """Keeps what a finished run took beyond its planned tensors. A disk that is full or read-only is no reason to fail."""
    line = _key(record.device.name) | {"overhead_bytes": record.memory.peak_bytes - plan.tensor_bytes}
    with suppress(OSError):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def known_overhead(device_name: str) -> int | None:
    """The median of this device's latest runs with these versions; None where there are none."""
    key, found = _key(device_name), []
    try:
        lines = _path().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            overhead = int(row.pop("overhead_bytes"))
            if row == key and overhead > 0:
                found.append(overhead)
    return int(median(found[-LATEST:])) if found else None


def _key(device_name: str) -> dict[str, str]:
    here = versions()
    return {"device": device_name, "siliang": here["siliang"], "torch": here["torch"]}


def _path() -> Path:
    return cache_folder() / FILE
