"""When a training saves and stops before its end: by the clock, or by a signal."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SECOND_SIGNAL_S = 2.0  # a launcher sends its processes, once more, a signal that the terminal has sent already


@dataclass
class Timer:
    """Says when it is time to save, and when to stop.

    Attributes:
        save_every_s: Seconds between two checkpoints; None for no checkpoints by the clock.
        stop_at: When to have stopped, by time.monotonic(); None for never.
        save_s: What a checkpoint is expected to take before one was made.
    """

    save_every_s: float | None = None
    stop_at: float | None = None
    save_s: float = 0.0
    _last_step: float = 0.0
    _last_save: float = 0.0
    _slowest_step_s: float = 0.0

    def start(self) -> None:
        """The training begins, or resumes."""
        self._last_step = self._last_save = time.perf_counter()

    def step_ended(self) -> None:
        """An optimizer step was made. The first of a process also warms up what the others use."""
        now = time.perf_counter()
        self._slowest_step_s = max(self._slowest_step_s, now - self._last_step)
        self._last_step = now

    def saved(self, seconds: float) -> None:
        """A checkpoint was made, in so many seconds."""
        self._last_save = time.perf_counter()
        self.save_s = max(self.save_s, seconds)

    @property
    def save_is_due(self) -> bool:
        return self.save_every_s is not None and time.perf_counter() - self._last_save >= self.save_every_s

    @property
    def time_is_over(self) -> bool:
        """Whether one more step, which may evaluate, and the checkpoint after it might end too late."""
        reserve_s = 2 * self._slowest_step_s + 2 * self.save_s + 1.0
        return self.stop_at is not None and time.monotonic() + reserve_s >= self.stop_at


@contextmanager
def stopping_on_signal(*, launched: bool) -> Iterator[threading.Event]:
    """Within the block the first Ctrl-C (or SIGTERM) sets the event; the second interrupts at once.

    Args:
        launched: The process has a launcher, which passes on what the terminal has sent already: a second signal that
            follows within a moment is the same as the first.
    """
    stop = threading.Event()
    first = 0.0
    moment_s = SECOND_SIGNAL_S if launched else 0.0
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if stop.is_set() and time.monotonic() - first >= moment_s:
            raise KeyboardInterrupt
        if not stop.is_set():
            first = time.monotonic()
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
