"""The worker processes, as seen from the one that asks: each does one request after the other."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from siliang.compare.received import as_message
from siliang.files import append
from siliang.safe_json import JsonError, parse_json
from siliang.secrets import short_repr, shortened

SAYS = ("say", "progress", "done", "failed")  # of the kinds of messages, those of a worker
STOP_S = 30.0  # for a run to end its step and save it, when the user stops a comparison


@dataclass(frozen=True)
class Event:
    """Something that a worker said of a request.

    Attributes:
        kind: began, say, progress, lost, where the process is gone and the request is done again (only on a cluster),
            done, failed, or died, where the process is gone for good.
        number: Of the request, in the order in which they were given.
        message: The worker's own words.
    """

    kind: str
    number: int
    message: dict[str, Any]


class Pool:
    """Workers for the life of a `with` block; a worker that dies is replaced by the next request.

    Args:
        jobs: How many. On CUDA each gets one of the visible cards, on the CPU its share of the threads.
        logs: Folder for what the workers' libraries print.
    """

    def __init__(self, jobs: int, logs: Path) -> None:
        self._workers = [Worker(logs / f"worker-{i + 1}.log", partial(_share, i, jobs)) for i in range(jobs)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.stop()
        try:
            for worker in self._workers:
                worker.wait(STOP_S)
        finally:
            for worker in self._workers:
                worker.close()

    def run(self, requests: Iterable[dict[str, Any]]) -> Iterator[Event]:
        """Has all requests done, in order, by whichever worker is free, and tells what happens as it happens."""
        waiting = deque(enumerate(requests))
        left = len(waiting)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()

        def serve(worker: Worker) -> None:
            while True:
                try:
                    number, request = waiting.popleft()  # atomic
                except IndexError:
                    return
                events.put(Event("began", number, {}))
                worker.ask(request, lambda message, n=number: events.put(Event(message["kind"], n, message)))

        for worker in self._workers[: max(left, 1)]:
            threading.Thread(target=serve, args=(worker,), daemon=True).start()
        while left:
            event = events.get()
            left -= event.kind in ("done", "failed", "died")
            yield event


class Worker:
    """One process; it begins with the first request.

    Args:
        log: For what its libraries print.
        environment: What it has beside this process's variables.
        folder: Where it works; None for where this process does.
    """

    def __init__(self, log: Path, environment: Callable[[], dict[str, str]], folder: Path | None = None) -> None:
        self._log, self._environment, self._folder = log, environment, folder
        self._process: subprocess.Popen[str] | None = None
        self._closed = False
        self._idle = threading.Event()
        self._idle.set()

    def ask(self, request: dict[str, Any], hear: Callable[[dict[str, Any]], None]) -> None:
        """Sends a request and passes on what comes, up to done, failed or died."""
        if self._closed:
            return
        if self._process is None or self._process.poll() is not None:
            self._start()
        self._idle.clear()
        try:
            hear(self._answer(request, hear))
        finally:
            self._idle.set()

    def _answer(self, request: dict[str, Any], hear: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Sends, passes on what comes, and returns the last word."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if (message := read_message(line)) is None:
                self._process.kill()
                said = f"it was sent {short_repr(line.strip())}, which is no message of a worker"
                return {"kind": "died", "error": f"{said} (see {self._log})"}
            if message["kind"] in ("done", "failed"):
                return dict(message)
            hear(message)
        return {"kind": "died", "error": _why_gone(self._process.wait(), self._log)}

    def stop(self) -> None:
        """Takes no more requests; the run that it is at, if any, is told to save a checkpoint and end."""
        self._closed = True
        if self._process is not None and not self._idle.is_set():
            self._process.terminate()

    def wait(self, seconds: float) -> None:
        """Until it is done with what it is at, at most so long."""
        self._idle.wait(seconds)

    def close(self) -> None:
        """Ends the process, whatever it does."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._close_pipes()

    def _close_pipes(self) -> None:
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()

    def _start(self) -> None:
        self._close_pipes()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with append(self._log) as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "siliang.compare.worker"],  # no module comes from the folder at hand
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=os.environ | self._environment(),
                cwd=self._folder,
                start_new_session=True,  # Ctrl-C is for the process that asks
            )


def read_message(line: str) -> dict[str, Any] | None:
    """What a worker said in a line; None where it is no message of one."""
    try:
        message = as_message(parse_json(line, foreign=True))  # a loss may be NaN
    except JsonError:
        return None
    return message if message is not None and message["kind"] in SAYS else None


def _share(number: int, of: int) -> dict[str, str]:
    """A worker's card, or its share of the processor."""
    import torch

    if cards := torch.cuda.device_count():
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        visible = named.split(",") if named else [str(i) for i in range(cards)]
        return {"CUDA_VISIBLE_DEVICES": visible[number % len(visible)]}
    return {} if of == 1 else {"OMP_NUM_THREADS": str(threads_each(of))}


def threads_each(jobs: int) -> int:
    """The threads of each of so many runs that share this machine."""
    import torch

    return max(1, torch.get_num_threads() // jobs)


def _why_gone(code: int, log: Path) -> str:
    if code == -signal.SIGKILL:
        return "the process was killed, most likely because the machine's memory was full"
    with suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if lines:
            return f"the process ended with code {code}: {shortened(lines[-1], 200)} (see {log})"
    return f"the process ended with code {code}"
