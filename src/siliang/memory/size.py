"""Sizes of memory as people write them."""

from __future__ import annotations

import re

from siliang.types import ConfigError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(text: str) -> int:
    """ "12GB" or "800 MB" in bytes (decimal units, as memory is sold; GiB are binary).

    Raises:
        ConfigError: It is no size.
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not found or not re.fullmatch(r"\d+(\.\d+)?", found[1]):
        raise ConfigError(f"{text!r} is no size of memory: write it as 12GB or 800MB, or auto.")
    unit = UNITS[found[2].upper()]
    if found[3]:
        unit = 1024 ** list(UNITS).index(found[2].upper())
    return int(float(found[1]) * unit)


def show_bytes(n_bytes: float) -> str:
    """Bytes for people: 512 B, 3.1 KB, 1.31 GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    raise AssertionError
