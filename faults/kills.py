"""SIGKILL at random moments, then --resume, until the run is finished: the result must be an undisturbed run's."""

from __future__ import annotations

import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from faults.runs import Child, Place, damaged_parts, outcome, run, slow_saving


@dataclass
class Kills:
    """Counts.

    Attributes:
        while_saving: Of the kills, those that left a checkpoint half written under its temporary name.
        runs: Finished after all.
        equal: Of these, bit for bit as the undisturbed one.
        corrupted: Run folders in which something was not whole after a kill.
    """

    kills: int = 0
    while_saving: int = 0
    runs: int = 0
    equal: int = 0
    corrupted: int = 0

    @property
    def passed(self) -> bool:
        return self.kills > 0 and self.corrupted == 0 and self.runs == self.equal > 0


def kill_at_random(place: Place, folder: Path, *, kills: int, seed: int = 0, method: str = "lora") -> Kills:
    """Kills so many times, and lets the last run come to its end."""
    chance, counts = random.Random(seed), Kills()
    started = time.perf_counter()
    assert run(place.config(folder / "peace", method), hook=slow_saving).code == 0
    length_s = time.perf_counter() - started
    wanted = outcome(folder / "peace")
    config = place.config(folder / "war", method)
    resume = False
    while True:
        child = Child(config, resume=resume, hook=slow_saving)
        if counts.kills < kills:
            if chance.random() < 0.9:  # the others are killed while they load
                child.wait_for("step ")
            time.sleep(chance.uniform(0.0, length_s / 3))
            ending = child.kill()
        else:
            ending = child.end()
        killed = ending.code == -signal.SIGKILL
        counts.kills += killed
        if killed:
            counts.while_saving += any((folder / "war" / "checkpoints").glob(".checkpoint-*.tmp*"))
            resume = (folder / "war" / "run.json").is_file()
            if resume:
                counts.corrupted += bool(damaged_parts(folder / "war"))
            else:
                shutil.rmtree(folder / "war", ignore_errors=True)
            continue
        counts.runs += 1
        counts.equal += ending.code == 0 and outcome(folder / "war") == wanted
        if counts.kills >= kills:
            return counts
        shutil.rmtree(folder / "war", ignore_errors=True)
        resume = False
