"""The Ray actor that has runs done on the machine where Ray has put it, one after the other.

The actor trains nothing itself. It puts the files where the run finds them, has the run done by a worker process as
`--jobs` has it, and passes on the worker's messages. So a run is the same code in the same kind of process as without
Ray.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import ray

from siliang.compare.packed import PIECE_BYTES, Packed, restore_paths, unpack, unpack_once, walk, with_users_paths
from siliang.compare.pool import FINAL, Worker
from siliang.compare.received import RUN_FILE, Message
from siliang.data.cache import cache_folder
from siliang.files import remove_tree

PROGRESS_S = 0.2  # between two messages of progress: steps may be quicker than the network
SOURCE = str(Path(__file__).resolve().parents[2])
VERSIONS = ("siliang", "torch", "transformers")  # the packages that results depend on


class Host:
    """One worker process on a machine of the cluster, which keeps the base model between runs.

    Args:
        logs: The user's folder for workers' logs, which a machine with a disk of its own does not have.
    """

    def __init__(self, logs: str) -> None:
        self._cache = cache_folder() / "cluster"
        self._cache.mkdir(exist_ok=True)
        folder = Path(logs) if Path(logs).is_dir() else self._cache / "logs"
        # the worker imports the siliang that this process has, wherever Ray found it
        source = {"PYTHONPATH": os.pathsep.join(filter(None, [SOURCE, os.environ.get("PYTHONPATH")]))}
        self._worker = Worker(folder / f"{socket.gethostname()}-{os.getpid()}.log", lambda: source)

    def describe(self) -> Message:
        """The machine's name, Ray's id of it, its versions, and where files are unpacked there."""
        return {
            "kind": "ready",
            "node": socket.gethostname(),
            "node_id": ray.get_runtime_context().get_node_id(),
            "versions": {name: version(name) for name in VERSIONS},
            "cache": str(self._cache),
        }

    def sees(self, marker: str, states: dict[str, tuple[int, int]]) -> bool:
        """Whether this machine sees the user's folder and the files that a run reads: the same bytes and time of change
        in nanoseconds."""
        try:
            found = {path: Path(path).stat() for path in states}
            return Path(marker).is_file() and states == {p: (s.st_size, s.st_mtime_ns) for p, s in found.items()}
        except OSError:
            return False

    def run(self, request: Message, inputs: Packed | None, started: Packed | None) -> Iterator[Message]:
        """Has one request done, and yields its messages, up to done, failed or died.

        Args:
            request: As a worker takes it, with the paths of this machine.
            inputs: The files that the run reads; None where it reads and writes the user's own.
            started: The run's folder as far as it came, where it is resumed from a copy.
        """
        output, copy = Path(request["config"]["output"]), None
        if inputs is not None:
            copy = self._cache / output.relative_to(self._cache).parts[0]
            unpack_once(inputs, self._cache, ray.get)
            output.parent.mkdir(parents=True)
            if started is not None:
                unpack(started, copy, ray.get)
            if request["kind"] == "base":
                output.mkdir(exist_ok=True)
        last: Message = {"kind": "failed", "error": "stopped"}
        sent_s = 0.0
        try:
            for message in self._worker.ask(request):
                last = with_users_paths(message, self._cache)
                if last["kind"] not in FINAL and (last["kind"] != "progress" or time.monotonic() > sent_s + PROGRESS_S):
                    yield last
                    sent_s = time.monotonic()
            if copy is not None and output.is_dir():
                restore_paths(output, self._cache)
                yield from _pieces(output)
        finally:
            if copy is not None:
                remove_tree(copy)
        yield last

    def stop(self) -> None:
        """Has the run that is under way save a checkpoint and end."""
        self._worker.stop()
        self._worker.wait()
        self._worker.close()


def _pieces(folder: Path) -> Iterator[Message]:
    """The files of a run's folder, piece by piece, and the sum of their bytes."""
    total = 0
    for path in walk(folder):
        name = path.relative_to(folder).as_posix()
        if not RUN_FILE.fullmatch(name):  # a library left it there
            continue
        yield {"kind": "file", "name": name, "bytes": b""}  # an empty file has no piece
        with path.open("rb") as opened:
            while piece := opened.read(PIECE_BYTES):
                yield {"kind": "file", "name": name, "bytes": piece}
                total += len(piece)
    yield {"kind": "folder", "nbytes": total}
