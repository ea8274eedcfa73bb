"""Bits flipped and files cut short, in checkpoints and in adapters."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.runs import Child, Place, outcome, run
from siliang.run_folder import open_run
from siliang.types import AdapterError, SiliangError


@dataclass
class Damage:
    """Counts.

    Attributes:
        noticed: By name: a checkpoint skipped with a warning, an adapter refused.
        harmless: Not noticed, and the result was the same.
        wrong: Neither.
    """

    cases: int = 0
    noticed: int = 0
    harmless: int = 0
    wrong: int = 0

    @property
    def passed(self) -> bool:
        return self.cases > 0 and self.wrong == 0


def flip(path: Path, chance: random.Random) -> None:
    """Flips one bit."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut(path: Path, chance: random.Random) -> None:
    """Cuts off the end."""
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])


HARM: tuple[Callable[[Path, random.Random], None], ...] = (flip, flip, flip, cut)


def damage_checkpoints(place: Place, folder: Path, *, cases: int, seed: int = 0) -> Damage:
    """Resumes runs whose newest checkpoint is damaged."""
    chance, counts = random.Random(seed), Damage()
    assert run(place.config(folder / "peace")).code == 0
    wanted = outcome(folder / "peace")
    child = Child(place.config(folder / "stopped"))
    child.wait_for("step 26\n")  # checkpoints 21 and 24 are there
    child.kill()
    for _ in range(cases):
        harmed = folder / "harmed"
        shutil.rmtree(harmed, ignore_errors=True)
        shutil.copytree(folder / "stopped", harmed)
        newest = max((harmed / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
        chance.choice(HARM)(chance.choice(sorted(p for p in newest.iterdir() if p.stat().st_size)), chance)
        ending = run(place.config(harmed), resume=True)
        _count(counts, f"{newest.name} is damaged" in ending.output, ending.code == 0 and outcome(harmed) == wanted)
    return counts


def damage_adapters(place: Place, folder: Path, *, cases: int, seed: int = 0) -> Damage:
    """Opens runs whose adapter is damaged."""
    chance, counts = random.Random(seed), Damage()
    assert run(place.config(folder / "done")).code == 0
    whole = {p.name: p.read_bytes() for p in (folder / "done" / "adapter").iterdir()}
    for _ in range(cases):
        name = chance.choice(sorted(whole))
        path = folder / "done" / "adapter" / name
        chance.choice(HARM)(path, chance)
        counts.cases += 1
        try:
            open_run(folder / "done")
            same = all((path.parent / n).read_bytes() == b for n, b in whole.items() if n != "manifest.json")
            counts.harmless += same
            counts.wrong += not same
        except AdapterError:
            counts.noticed += 1
        except SiliangError:
            counts.wrong += 1
        path.write_bytes(whole[name])
    open_run(folder / "done")
    return counts


def _count(counts: Damage, noticed: bool, right: bool) -> None:
    counts.cases += 1
    counts.noticed += noticed and right
    counts.harmless += right and not noticed
    counts.wrong += not right
