"""Bounds on time and memory for what strangers have written: chat templates, patterns of module names."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # Windows has neither limits nor alarms
    resource = None

SECONDS = 5.0
EXTRA_BYTES = 2 * 2**30


class LimitError(Exception):
    """The block took longer than it may."""


@contextmanager
def limited(seconds: float | None = None, extra_bytes: int | None = EXTRA_BYTES) -> Iterator[None]:
    """Stops the block's Python after `seconds`, or SECONDS, and refuses it more than `extra_bytes` of new memory.

    Time is bounded in the main thread alone, where Python hears of signals (processes that tokenise have one each).
    Memory is bounded on Linux.

    Raises:
        LimitError: It took too long.
        MemoryError: It wanted too much.
    """
    if resource is None:
        yield
        return
    timed = threading.current_thread() is threading.main_thread()
    before: Any = None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if timed:
            before = signal.signal(signal.SIGALRM, _stop)
            # again and again: the first may meet code that swallows every error
            signal.setitimer(signal.ITIMER_REAL, seconds or SECONDS, 0.1)
        if extra_bytes is not None and (used := _address_space()) is not None:
            wanted = used + extra_bytes
            resource.setrlimit(resource.RLIMIT_AS, (wanted if soft < 0 else min(soft, wanted), hard))
        yield
    finally:
        # the timer first: its alarm between the other two would leave it on for ever
        if timed:
            with suppress(LimitError):  # an alarm that comes while it is switched off
                signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _stop(number: int, frame: Any) -> None:
    raise LimitError("it runs for too long")


def _address_space() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    except (OSError, ValueError):
        return None
