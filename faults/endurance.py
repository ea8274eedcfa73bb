"""Hours' worth of steps in minutes: memory and open files must level off."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch

from faults.runs import Place
from siliang.train.log import Progress
from siliang.train.run import train
from siliang.train.types import Listener

ALLOWED_GROWTH = 1.05  # of resident memory, from a third of the way on


@dataclass
class Endurance:
    """Measurements at regular intervals of steps."""

    steps: int = 0
    seconds: float = 0.0
    resident_bytes: list[int] = field(default_factory=list)
    open_files: list[int] = field(default_factory=list)
    checkpoints: int = 0

    @property
    def growth(self) -> float:
        """The mean of the last third, relative to that of the second."""
        middle, last = _thirds(self.resident_bytes)
        return (sum(last) / len(last)) / (sum(middle) / len(middle))

    @property
    def passed(self) -> bool:
        if len(self.open_files) < 3:
            return False
        middle, last = _thirds(self.open_files)
        # The smallest count: a file that never closes is in all that follow, one that a watching thread
        # happens to be reading is in one.
        return min(last) <= min(middle) and self.growth < ALLOWED_GROWTH


def _thirds(values: list[int]) -> tuple[list[int], list[int]]:
    """The second and the last third of `values`, of which there are at least three."""
    n = len(values) // 3
    return values[n : 2 * n], values[-n:]


def endure(place: Place, folder: Path, *, steps: int) -> Endurance:
    """Trains `steps` steps with 100 checkpoints and evaluations."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_run, args=(place, folder / "long", steps, send))
    process.start()
    send.close()
    found = receive.recv()
    process.join()
    return found


def _run(place: Place, folder: Path, steps: int, send: Connection) -> None:
    torch.set_num_threads(1)
    every = max(1, steps // 100)
    config = place.config(folder, max_steps=steps, save_every=every, eval_every=every, log_every=every, keep=3)
    found, me, started = Endurance(steps), psutil.Process(), time.perf_counter()

    def look(progress: Progress) -> None:
        if progress.logged:
            found.resident_bytes.append(me.memory_info().rss)
            found.open_files.append(me.num_fds())

    train(config, Listener(progress=look))
    found.seconds = time.perf_counter() - started
    found.checkpoints = len(list((folder / "checkpoints").iterdir()))
    send.send(found)
