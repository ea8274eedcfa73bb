"""Parses and shows sizes of memory and durations."""

from __future__ import annotations

import re

from siliang.language import Bilingual
from siliang.types import ConfigError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(text: str) -> int:
    """ "12GB" or "800 MB" in bytes (decimal units, as memory is sold; GiB are binary).

    Raises:
        ConfigError: It is not a size.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE | re.ASCII)
    if not match or not re.fullmatch(r"\d{1,18}(\.\d{1,18})?", match[1], re.ASCII):
        raise ConfigError(
            Bilingual(
                f"{text!r} is not a size of memory: write it as 12GB or 800MB, or auto.",
                f"{text!r} 不是内存大小：应写成 12GB 或 800MB，或 auto。",
            )
        )
    unit = UNITS[match[2].upper()]
    if match[3]:
        unit = 1024 ** list(UNITS).index(match[2].upper())
    return int(float(match[1]) * unit)


def show_bytes(n_bytes: float) -> str:
    """Bytes with a unit: 512 B, 3.1 KB, 1.31 GB, 1,300 GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if round(n_bytes, 1) < 999.5 or unit == "GB":  # 999.6 MB would be shown as 1000 MB
            break
        n_bytes /= 1000
    digits = 0 if unit == "B" or n_bytes >= 99.95 else 1 if n_bytes >= 9.995 else 2
    shown = f"{n_bytes:,.{digits}f}"
    return f"{shown.rstrip('0').rstrip('.') if '.' in shown else shown} {unit}"


def parse_duration(text: str) -> float:
    """ "8h", "90m", "45s", "1h30m" or "1:30:00" in seconds.

    Raises:
        ConfigError: It is not a duration.
    """
    number = r"(\d{1,9}(?:\.\d{1,9})?)"
    words = re.fullmatch(rf"\s*(?:{number}d)?\s*(?:{number}h)?\s*(?:{number}m)?\s*(?:{number}s)?\s*", text, re.ASCII)
    clock = re.fullmatch(r"\s*(?:(\d{1,9}):)?(\d{1,9}):(\d\d):(\d\d)\s*", text, re.ASCII)
    match = clock or words
    seconds = (
        sum(float(n or 0) * unit for n, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True)) if match else 0
    )
    if not seconds:
        raise ConfigError(
            Bilingual(
                f"{text!r} is not a duration: write it as 8h, 90m, 1h30m or 1:30:00.",
                f"{text!r} 不是时长：应写成 8h、90m、1h30m 或 1:30:00。",
            )
        )
    return seconds
