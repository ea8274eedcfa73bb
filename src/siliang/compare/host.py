"""The Ray actor that executes runs on its machine, one after the other.

The actor itself does not train. It unpacks the files that a run reads, starts the same worker process that `--jobs`
uses, and forwards the worker's messages. So a run is the same code in the same kind of process with and without Ray.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import ray

from siliang.compare.packed import PIECE_BYTES, Packed, restore_paths, unpack, unpack_once, walk, with_user_paths
from siliang.compare.pool import FINAL, Worker
from siliang.compare.received import RUN_FILE, Message
from siliang.data.cache import cache_folder
from siliang.files import remove_tree

PROGRESS_S = 0.2  # minimum time between two progress messages: steps may be faster than the network
SOURCE = str(Path(__file__).resolve().parents[2])
VERSIONS = ("siliang", "torch", "transformers")  # the packages that results depend on


class Host:
    """A worker process on a machine of the cluster. The process caches the base model between runs.

    Args:
        logs: The user's log folder. A machine without a shared disk does not have it, and uses its cache instead.
    """

    def __init__(self, logs: str) -> None:
        self._cache = cache_folder() / "cluster"
        self._cache.mkdir(exist_ok=True)
        folder = Path(logs) if Path(logs).is_dir() else self._cache / "logs"
        # the worker imports the same siliang as this process
        source = {"PYTHONPATH": os.pathsep.join(filter(None, [SOURCE, os.environ.get("PYTHONPATH")]))}
        self._worker = Worker(folder / f"{socket.gethostname()}-{os.getpid()}.log", lambda: source)

    def describe(self) -> Message:
        """The machine's name and Ray id, its package versions, and the folder where it unpacks files."""
        return {
            "kind": "ready",
            "node": socket.gethostname(),
            "node_id": ray.get_runtime_context().get_node_id(),
            "versions": {name: version(name) for name in VERSIONS},
            "cache": str(self._cache),
        }

    def shares_disk(self, marker: str, states: dict[str, tuple[int, int]]) -> bool:
        """Whether this machine has the user's folder and the input files of a run, each with the same size in bytes and
        the same modification time in nanoseconds."""
        try:
            found = {path: Path(path).stat() for path in states}
            return Path(marker).is_file() and states == {p: (s.st_size, s.st_mtime_ns) for p, s in found.items()}
        except OSError:
            return False

    def run(self, request: Message, inputs: Packed | None, started: Packed | None) -> Iterator[Message]:
        """Executes one request and yields its messages; the last one is done, failed or died.

        Args:
            request: A request to a worker, with the paths of this machine.
            inputs: The files that the run reads; None if the machine shares the user's disk.
            started: The run's folder, if an interrupted run is resumed on a machine that does not share the disk.
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
            for message in self._worker.run(request):
                last = with_user_paths(message, self._cache)
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
        """Stops the current run after it has saved a checkpoint."""
        self._worker.stop()
        self._worker.wait()
        self._worker.close()


def _pieces(folder: Path) -> Iterator[Message]:
    """The files of a run's folder, in pieces, and then the sum of their bytes."""
    total = 0
    for path in walk(folder):
        name = path.relative_to(folder).as_posix()
        if not RUN_FILE.fullmatch(name):  # written by a library
            continue
        yield {"kind": "file", "name": name, "bytes": b""}  # an empty file has no further piece
        with path.open("rb") as opened:
            while piece := opened.read(PIECE_BYTES):
                yield {"kind": "file", "name": name, "bytes": piece}
                total += len(piece)
    yield {"kind": "folder", "nbytes": total}
