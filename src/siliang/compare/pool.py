"""The worker processes of this machine. Each executes one request after the other."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self

from siliang.compare.received import Message, as_message
from siliang.files import append
from siliang.language import Bilingual
from siliang.safety.safe_json import JsonError, parse_json
from siliang.secrets import short_repr, shortened

WORKER_KINDS = ("say", "progress", "done", "failed")  # kinds of messages that a worker process sends
FINAL = ("done", "failed", "died")
STOP_S = 30.0  # for a run to finish its step and save a checkpoint, when the user stops a comparison


@dataclass(frozen=True)
class Event:
    """A message about a request.

    Attributes:
        kind: `began`; `say` and `progress`; `lost`: the process died and the request is repeated (on a cluster only);
            at the end `done`, `failed`, or `died`: the process died.
        number: The index of the request.
        message: The worker's message.
    """

    kind: str
    number: int
    message: Message


class AnyWorker(Protocol):
    """A worker process on this machine or on another one."""

    def run(self, request: Message) -> Iterator[Message]:
        """Executes a request and yields its messages, up to one of `FINAL`. A stopped worker yields nothing."""
        ...

    def stop(self) -> None:
        """Stops the current run after it has saved a checkpoint."""
        ...

    def wait(self) -> None:
        """Waits until the current run has ended, with a timeout."""
        ...

    def release(self) -> None:
        """Called when no request is left."""
        ...

    def close(self) -> None:
        """Ends the worker at once."""
        ...


def distribute(requests: Iterable[Message], workers: Sequence[AnyWorker]) -> Iterator[Event]:
    """Executes all requests, each on the next free worker, and yields the events as they happen."""
    numbered = list(enumerate(requests))
    waiting: queue.SimpleQueue[tuple[int, Message]] = queue.SimpleQueue()
    events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
    for item in numbered:
        waiting.put(item)

    def serve(worker: AnyWorker) -> None:
        try:
            with suppress(queue.Empty):
                while True:
                    number, request = waiting.get_nowait()
                    for message in worker.run(request):
                        events.put(Event(message["kind"], number, message))
            worker.release()
        except BaseException as error:  # raised in the main thread
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


def stop_all(workers: Sequence[AnyWorker]) -> None:
    """Stops the current runs after they have saved checkpoints, and ends the workers."""
    for worker in workers:
        worker.stop()
    try:
        for worker in workers:
            worker.wait()
    finally:
        for worker in workers:
            worker.close()


class Pool:
    """The workers of this machine, as a context manager. A worker that died is restarted for the next request.

    Args:
        jobs: The number of workers. Each gets one of the visible GPUs; on the CPU, an equal number of threads.
        logs: The folder for the output of the workers' libraries.
    """

    def __init__(self, jobs: int, logs: Path) -> None:
        self._workers = [Worker(logs / f"worker-{i + 1}.log", partial(_gpu_of, i), jobs) for i in range(jobs)]

    def start(self, requests: int) -> None:
        """Starts the processes for so many requests, so that they import their libraries while this process does.

        With GPUs each starts with its first request, because torch knows how many there are.
        """
        if not _may_have_gpus():
            for worker in self._workers[:requests]:
                worker.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop_all(self._workers)

    def close(self) -> None:
        """Ends the processes at once."""
        for worker in self._workers:
            worker.close()

    def run(self, requests: list[Message]) -> Iterator[Event]:
        """Executes all requests, each on the next free worker, and yields the events as they happen."""
        return distribute(requests, self._workers[: len(requests)])


class Worker:
    """One worker process. It starts with the first request, if it is not started before.

    Args:
        log: The file for the output of its libraries. It is written from the first request on.
        environment: Environment variables, in addition to those of this process.
        jobs: How many workers share the CPU's threads.
    """

    def __init__(self, log: Path, environment: Callable[[], dict[str, str]], jobs: int = 1) -> None:
        self._log, self._environment, self._jobs = log, environment, jobs
        self._before_log: IO[bytes] | None = None  # what the process writes before it knows the log
        self._copied = 0  # bytes of it that are in the log
        self._process: subprocess.Popen[str] | None = None
        self._closed = False
        self._idle = threading.Event()
        self._idle.set()

    def run(self, request: Message) -> Iterator[Message]:
        """Sends a request and yields the replies, up to done, failed or died. A stopped worker yields nothing."""
        if self._closed:
            return
        self._idle.clear()
        try:
            self.start()
            yield {"kind": "began"}
            yield from self._replies(request)
        finally:
            self._idle.set()

    def _replies(self, request: Message) -> Iterator[Message]:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._copy_output()
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request | {"log": str(self._log)}) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            message = read_message(line)
            if message is None:
                self._process.kill()
                sent = short_repr(line.strip())
                error = Bilingual(
                    f"the worker process sent {sent}, which is not a valid message (see {self._log})",
                    f"工作进程发来的 {sent} 不是有效消息（见 {self._log}）",
                )
                yield {"kind": "died", "error": error}
                return
            yield message
            if message["kind"] in FINAL:
                return
        code = self._process.wait()
        self._copy_output()
        yield {"kind": "died", "error": _exit_reason(code, self._log)}

    def stop(self) -> None:
        """Accepts no more requests, and stops the current run after it has saved a checkpoint."""
        self._closed = True
        if self._process is not None and not self._idle.is_set():
            self._process.terminate()

    def wait(self) -> None:
        """Waits until the current run has ended, `STOP_S` seconds at most."""
        self._idle.wait(STOP_S)

    def release(self) -> None:
        """Does nothing: the process caches the base model for later requests."""

    def close(self) -> None:
        """Kills the process."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._close_pipes()

    def _close_pipes(self) -> None:
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout, self._before_log):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()

    def start(self) -> None:
        """Starts the process, if it is not running."""
        if self._process is not None and self._process.poll() is None:
            return
        self._close_pipes()
        self._before_log, self._copied = tempfile.TemporaryFile(), 0  # noqa: SIM115, the log's folder may not be there
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "siliang.compare.worker", str(self._jobs)],  # -P: no module of this folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._before_log,
            text=True,
            encoding="utf-8",
            env=os.environ | self._environment(),
            start_new_session=True,  # Ctrl-C is for the parent process
        )

    def _copy_output(self) -> None:
        """Copies what the process has written before it knew its log into the log."""
        assert self._before_log is not None
        number = self._before_log.fileno()
        # not by seeking: the process writes where this one would read
        written = os.pread(number, os.fstat(number).st_size - self._copied, self._copied)
        with append(self._log) as log:
            log.write(written)
        self._copied += len(written)


def read_message(line: str) -> Message | None:
    """The worker's message in a line; None if the line is not a message."""
    try:
        message = as_message(parse_json(line, foreign=True))  # a loss may be NaN
    except JsonError:
        return None
    return message if message is not None and message["kind"] in WORKER_KINDS else None


def _may_have_gpus() -> bool:
    """Whether torch may find GPUs here; without importing it."""
    devices = ("nvidia[0-9]*", "kfd", "dxg")  # of CUDA, ROCm, WSL
    return sys.platform != "linux" or any(next(Path("/dev").glob(name), None) for name in devices)


def _gpu_of(number: int) -> dict[str, str]:
    """The variables that give a worker its GPU."""
    if not _may_have_gpus():
        return {}
    import torch

    if n_gpus := torch.cuda.device_count():
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        visible = given.split(",") if given else [str(i) for i in range(n_gpus)]
        return {"CUDA_VISIBLE_DEVICES": visible[number % len(visible)]}
    return {}


def too_many(jobs: int) -> Bilingual | None:
    """What so many runs at once cost, where they are more than the CPU's threads; None where they are not."""
    import torch

    if torch.cuda.is_available() or jobs <= (threads := torch.get_num_threads()):
        return None
    return Bilingual(
        f"--jobs {jobs} on {threads} threads: each run is slower, and takes its own memory",
        f"--jobs {jobs} 多于 {threads} 个线程：每次运行都更慢，且各占一份内存",
    )


def threads_each(jobs: int) -> int:
    """The CPU threads of each run if `jobs` runs share this machine."""
    import torch

    return max(1, torch.get_num_threads() // jobs)


def _exit_reason(code: int, log: Path) -> str:
    if code == -signal.SIGKILL:
        return Bilingual(
            "the process was killed, probably because the machine's memory was full",
            "进程被杀死，多半是因为机器内存已满",
        )
    with suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if lines:
            last = shortened(lines[-1], 200)
            return Bilingual(
                f"the process ended with code {code}: {last} (see {log})", f"进程以代码 {code} 结束：{last}（见 {log}）"
            )
    return Bilingual(f"the process ended with code {code}", f"进程以代码 {code} 结束")
