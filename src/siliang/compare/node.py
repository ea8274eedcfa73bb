"""One trial as a Ray task, on whichever machine of the cluster it falls.

The task trains nothing itself: it puts the files where the trial finds them, has it done by a worker process such as
`--jobs` has, and passes on what that says. So a trial is the same code in the same kind of process as without Ray, its
memory is its own, and Ray is not in it.
"""

from __future__ import annotations

import asyncio
import os
import queue
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any

from siliang.compare.freight import CHUNK_BYTES, FOLDER, Crate, Freight, Names, keep, unpack
from siliang.compare.pool import STOP_S, Worker
from siliang.compare.received import RUN_FILE
from siliang.data.cache import cache_folder
from siliang.files import remove_tree

TELL_S = 0.2  # between two words on how far it is: steps may be quicker than the network
LOOK_S = 0.2  # between two looks at whether the user has stopped the comparison
IDLE_S = 5.0  # a base model that no trial came for makes room
SOURCE = str(Path(__file__).resolve().parents[2])
VERSIONS = ("siliang", "torch", "transformers")  # those that figures hang on


@dataclass(frozen=True)
class Job:
    """What a task is given.

    Attributes:
        request: As a worker takes it, with the user's own names.
        freights: The files that it reads.
        crates: Those of them that some machine did not have, by their names.
        begun: The run's folder as far as it came, where it goes on and a machine asked for it.
        sign: A file beside the runs: who sees it can write there.
        apart: Look for none of the user's files; take copies.
        work: The folder that relative paths are seen from.
        logs: Where workers' logs go, seen from there.
        environment: For the worker.
        versions: Of the machine that asks.
        bell: Rings when the comparison is stopped.
    """

    request: dict[str, Any]
    freights: tuple[Freight, ...]
    sign: str
    apart: bool
    work: str
    logs: str
    environment: dict[str, str]
    versions: dict[str, str]
    bell: Any
    crates: dict[str, Crate] = field(default_factory=dict)
    begun: Crate | None = None


class Bell:
    """A Ray actor: all who wait hear it at once."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    async def ring(self) -> None:
        """Stops the comparison."""
        self._rung.set()

    async def wait(self) -> None:
        """Until it has rung."""
        await self._rung.wait()


def serve(job: Job) -> Iterator[dict[str, Any]]:
    """Does one request and yields what is to be said of it, up to `done`, `failed`, `died`, or `wants`, where files
    are missing here."""
    import ray

    node = socket.gethostname()
    names, shared = Names(), not job.apart and Path(job.sign).is_file() and Path(job.work).is_dir()
    missing = [f for f in job.freights if job.apart or not f.is_here(job.work)]
    resume = bool(job.request.get("resume"))
    wanted = [f.given for f in missing if f.given not in job.crates]
    if wanted or (resume and not shared and job.begun is None):
        yield {"kind": "wants", "files": wanted, "run": resume and not shared}
        return
    here = own_versions()
    yield {"kind": "began", "node": node, "node_id": ray.get_runtime_context().get_node_id(), "versions": here}
    if here["siliang"] != job.versions["siliang"]:
        yield {
            "kind": "failed",
            "error": f"{node} has siliang {here['siliang']}, not {job.versions['siliang']}: install the same there",
        }
        return
    for freight in missing:
        names.add(freight, _aside(lambda f=freight: keep(job.crates[f.given], ray.get)))
    given = job.request["config"]["output"]
    folder = Path(given)
    if not shared:
        folder = cache_folder() / FOLDER / f"run-{uuid.uuid4().hex}" / folder.name
        folder.parent.mkdir(parents=True)
        names.add_folder(given, folder)
        if job.begun is not None:
            begun = job.begun
            _aside(lambda: unpack(begun, folder, ray.get))
        if job.request["kind"] == "base":
            folder.mkdir(exist_ok=True)
    request = job.request | {"config": names.forwards(job.request["config"])}
    try:
        logs = Path(job.work) / job.logs if shared else cache_folder() / FOLDER / "logs"
        work = Path(job.work) if Path(job.work).is_dir() else None
        told = 0.0
        stopped = _rung(job)
        last: dict[str, Any] = {"kind": "failed", "error": "it did not end when it was stopped"}
        for message in _KEPT.ask(request, logs, work, job.environment, stopped):
            last = names.back(message)
            if last["kind"] == "say" or (last["kind"] == "progress" and time.monotonic() > told + TELL_S):
                yield last
                told = time.monotonic()
        if not shared and folder.is_dir():
            names.restore(folder)
            yield from _sent(folder)
    finally:
        if not shared:
            remove_tree(folder.parent)
    yield last  # after which this process may be ended at any time


def own_versions() -> dict[str, str]:
    """Of what is installed here, without importing it."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


class _Kept:
    """This process's worker, with the base model that it has loaded: for the next trial, if one comes soon."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._made_for: tuple[Any, ...] = ()
        self._timer: Timer | None = None

    def ask(
        self, request: dict[str, Any], logs: Path, work: Path | None, environment: dict[str, str], stopped: Event
    ) -> Iterator[dict[str, Any]]:
        """What the worker says of a request."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        # a task may get another card than the one before
        made_for = (logs, work, environment, os.environ.get("CUDA_VISIBLE_DEVICES"))
        if self._worker is None or self._made_for != made_for:
            self.close()
            self._made_for = made_for
            log = logs / f"{socket.gethostname()}-{os.getpid()}.log"
            # this process's siliang, wherever Ray found it
            own = {"PYTHONPATH": os.pathsep.join([SOURCE, *filter(None, [os.environ.get("PYTHONPATH")])])}
            self._worker = Worker(log, lambda: environment | own, work)
        worker, messages = self._worker, queue.SimpleQueue[dict[str, Any]]()
        Thread(target=worker.ask, args=(request, messages.put), daemon=True).start()
        told = False
        try:
            while True:
                if not told and stopped.is_set():
                    told = True
                    worker.stop()
                try:
                    message = messages.get(timeout=STOP_S if told else LOOK_S)
                except queue.Empty:
                    if told:
                        return
                    continue
                yield message
                if message["kind"] in ("done", "failed", "died"):
                    return
        finally:
            if told:
                self.close()
            else:
                self._timer = Timer(IDLE_S, self.close)
                self._timer.daemon = True
                self._timer.start()

    def close(self) -> None:
        """Ends the worker."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


_KEPT = _Kept()
_RUNG: dict[str, Event] = {}  # of each comparison that this process has worked for


def _rung(job: Job) -> Event:
    """What is set when the job's bell rings."""
    import ray
    from ray.exceptions import RayError

    if (known := _RUNG.get(job.sign)) is not None:
        return known
    rung = _RUNG[job.sign] = Event()

    def wait() -> None:
        with suppress(RayError):  # gone with the comparison
            ray.get(job.bell.wait.remote())
            rung.set()

    Thread(target=wait, daemon=True).start()
    return rung


def _aside(work: Callable[[], Any]) -> Any:
    """Does it in another thread: Ray takes a task that waits in its main thread for idle, and gives its processors to
    the next one."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result()


def _sent(folder: Path) -> Iterator[dict[str, Any]]:
    """A folder, in pieces."""
    total = 0
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    for name, path in sorted(files.items()):
        if not RUN_FILE.fullmatch(name):  # what a library left there
            continue
        first = True
        with path.open("rb") as opened:
            while (piece := opened.read(CHUNK_BYTES)) or first:
                yield {"kind": "file", "name": name, "bytes": piece}
                total += len(piece)
                first = False
    yield {"kind": "folder", "nbytes": total}
