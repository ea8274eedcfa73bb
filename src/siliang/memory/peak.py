"""Peak memory over a period: the CUDA allocator's own peak, or the process's resident memory."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

import psutil
import torch

from siliang.memory.free import trim_heap

SAMPLE_EVERY_S = 0.02
TRIM_EVERY_S = 2.0


class PeakMemory:
    """Measures memory within `with`.

    Attributes:
        start_bytes: Bytes in use at the start.
        peak_bytes: The most since then. On the CPU it is sampled fifty times a second; shorter spikes are missed.
    """

    def __init__(self, device: torch.device, planned: int = 0) -> None:
        """planned: On a CPU, the process returns unused memory from time to time while it uses more bytes; 0: never."""
        self._cuda = device if device.type == "cuda" else None
        self._process = psutil.Process()
        self._planned = planned
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.start_bytes = self.peak_bytes = 0

    def __enter__(self) -> Self:
        self.start_bytes = self.peak_bytes = self.now()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.update()
        self._stop.set()
        if self._thread:
            self._thread.join()

    def now(self) -> int:
        """Bytes in use at this moment."""
        return torch.cuda.memory_allocated(self._cuda) if self._cuda else self._process.memory_info().rss

    def update(self) -> int:
        """The peak so far, in bytes."""
        now = torch.cuda.max_memory_allocated(self._cuda) if self._cuda else self.now()
        self.peak_bytes = max(self.peak_bytes, now)
        return self.peak_bytes

    def _watch(self) -> None:
        trimmed = 0.0
        while not self._stop.wait(SAMPLE_EVERY_S):
            now = self.now()
            self.peak_bytes = max(self.peak_bytes, now)
            if self._planned and now > self._planned and time.monotonic() > trimmed + TRIM_EVERY_S:
                trim_heap()
                trimmed = time.monotonic()
