"""The worker processes of this machine: each does one request after the other."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from siliang.compare.received import Message, as_message
from siliang.files import append
from siliang.language import Bilingual
from siliang.safety.safe_json import JsonError, parse_json
from siliang.secrets import short_repr, shortened

SAYS = ("say", "progress", "done", "failed")  # of the kinds of messages, those of a worker process
FINAL = ("done", "failed", "died")
STOP_S = 30.0  # for a run to end its step and save it, when the user stops a comparison


@dataclass(frozen=True)
class Event:
    """A message about a request.

    Attributes:
        kind: `began`; `say` and `progress`; `lost`, where the process is gone and the request is done again (only on a
            cluster); and at the end `done`, `failed`, or `died`, where the process is gone for good.
        number: Of the request, in the order in which they were given.
        message: The worker's message.
    """

    kind: str
    number: int
    message: Message


class Asked(Protocol):
    """A worker, here or on another machine."""

    def ask(self, request: Message) -> Iterator[Message]:
        """Has a request done and yields its messages, up to one of `FINAL`; nothing once the worker is stopped."""
        ...

    def stop(self) -> None:
        """Has the run that is under way save a checkpoint and end."""
        ...

    def wait(self) -> None:
        """Until the run that is under way has ended, or is late."""
        ...

    def rest(self) -> None:
        """Called when no request is left."""
        ...

    def close(self) -> None:
        """Ends the worker at once."""
        ...


def share(requests: Iterable[Message], workers: Sequence[Asked]) -> Iterator[Event]:
    """Has all requests done, in order, by whichever worker is free, and yields what happens as it happens."""
    numbered = list(enumerate(requests))
    waiting: queue.SimpleQueue[tuple[int, Message]] = queue.SimpleQueue()
    events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
    for item in numbered:
        waiting.put(item)

    def serve(worker: Asked) -> None:
        try:
            with suppress(queue.Empty):
                while True:
                    number, request = waiting.get_nowait()
                    for message in worker.ask(request):
                        events.put(Event(message["kind"], number, message))
            worker.rest()
        except BaseException as error:  # the comparison ends with it
            events.put(error)

    for worker in workers:
        threading.Thread(target=serve, args=(worker,), daemon=True).start()
    left = len(numbered)
    while left:
        event = events.get()
        if isinstance(event, BaseException):
            raise event
        left -= event.kind in FINAL
        yield event


def stop_all(workers: Sequence[Asked]) -> None:
    """Has what is under way save itself and end, and ends the workers."""
    for worker in workers:
        worker.stop()
    try:
        for worker in workers:
            worker.wait()
    finally:
        for worker in workers:
            worker.close()


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
        stop_all(self._workers)

    def run(self, requests: list[Message]) -> Iterator[Event]:
        """Has all requests done, in order, by whichever worker is free, and yields what happens as it happens."""
        return share(requests, self._workers[: len(requests)])


class Worker:
    """One process; it starts with the first request.

    Args:
        log: For what its libraries print.
        environment: What it has beside this process's variables.
    """

    def __init__(self, log: Path, environment: Callable[[], dict[str, str]]) -> None:
        self._log, self._environment = log, environment
        self._process: subprocess.Popen[str] | None = None
        self._closed = False
        self._idle = threading.Event()
        self._idle.set()

    def ask(self, request: Message) -> Iterator[Message]:
        """Sends a request and yields what comes, up to done, failed or died; nothing once the worker is stopped."""
        if self._closed:
            return
        self._idle.clear()
        try:
            if self._process is None or self._process.poll() is not None:
                self._start()
            yield {"kind": "began"}
            yield from self._answers(request)
        finally:
            self._idle.set()

    def _answers(self, request: Message) -> Iterator[Message]:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            message = read_message(line)
            if message is None:
                self._process.kill()
                sent = short_repr(line.strip())
                said = Bilingual(
                    f"it sent {sent}, which is not a message of a worker (see {self._log})",
                    f"它发来了 {sent}，不是工作进程的消息（见 {self._log}）",
                )
                yield {"kind": "died", "error": said}
                return
            yield message
            if message["kind"] in FINAL:
                return
        yield {"kind": "died", "error": _why_gone(self._process.wait(), self._log)}

    def stop(self) -> None:
        """Takes no more requests, and has the run that is under way save a checkpoint and end."""
        self._closed = True
        if self._process is not None and not self._idle.is_set():
            self._process.terminate()

    def wait(self) -> None:
        """Until the run that is under way has ended, or is late."""
        self._idle.wait(STOP_S)

    def rest(self) -> None:
        """Keeps the base model for the next requests."""

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
                [sys.executable, "-P", "-m", "siliang.compare.worker"],  # -P: no module of the current folder
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=os.environ | self._environment(),
                start_new_session=True,  # Ctrl-C is for the parent process
            )


def read_message(line: str) -> Message | None:
    """A worker's message in a line; None where it is none."""
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
        return Bilingual(
            "the process was killed, most likely because the machine's memory was full",
            "进程被杀死，多半是因为机器内存已满",
        )
    with suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if lines:
            said = shortened(lines[-1], 200)
            return Bilingual(
                f"the process ended with code {code}: {said} (see {log})", f"进程以代码 {code} 结束：{said}（见 {log}）"
            )
    return Bilingual(f"the process ended with code {code}", f"进程以代码 {code} 结束")
