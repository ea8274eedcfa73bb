"""All hand-written cases, and any number of cases from the grammar."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from faults.folders import code, good, limits, links, numbers, pages, paths, ray, secrets, sizes, terminals
from faults.folders.bases import make_bases
from faults.folders.grammar import make_cases
from faults.folders.sandbox import Case, Outcome, try_cases

BY_HAND: dict[str, list[Case]] = {
    part.KIND: part.CASES for part in (good, code, links, limits, sizes, paths, secrets, terminals, numbers, ray, pages)
}
BATCH = 50  # cases of the grammar that one process goes through


@dataclass
class Tried:
    """Counts by kind.

    Attributes:
        failures: What each case did that it may not, by its kind and name.
        slowest: Seconds of the processor, and the case's name.
        largest: Bytes above what was there, and the case's name.
    """

    worked: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    failures: dict[str, list[str]] = field(default_factory=dict)
    slowest: tuple[float, str] = (0.0, "")
    largest: tuple[int, str] = (0, "")

    @property
    def cases(self) -> int:
        return self.worked.total() + self.refused.total() + self.failed.total()

    @property
    def passed(self) -> bool:
        return self.cases > 0 and not self.failures

    def take(self, case: Case, outcome: Outcome) -> None:
        """Counts a case."""
        name = f"{case.kind}: {case.name}"
        self.slowest = max(self.slowest, (outcome.seconds, name))
        self.largest = max(self.largest, (outcome.above_bytes, name))
        if outcome.faults:
            self.failed[case.kind] += 1
            self.failures[name] = outcome.faults
        else:
            (self.worked if outcome.ending == "works" else self.refused)[case.kind] += 1

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Of each kind: cases, and those that failed."""
        total = self.worked + self.refused + self.failed
        return {kind: (n, self.failed[kind]) for kind, n in total.items()}


def try_by_hand(bases: Path, folder: Path, cases: Sequence[Case] | None = None, *, lanes: int | None = None) -> Tried:
    """Tries the hand-written cases, or some of them, each in a separate process.

    Args:
        bases: Good folders, which are made there if they are not there yet.
        folder: An empty one, in which it happens.
    """
    make_bases(bases)
    found = Tried()
    chosen = [case for part in BY_HAND.values() for case in part] if cases is None else cases
    try_cases(chosen, folder, bases, lambda _, case, outcome: found.take(case, outcome), lanes=lanes or _lanes())
    return found


def try_made(bases: Path, folder: Path, n: int, *, seed: int = 0, lanes: int | None = None) -> Tried:
    """Tries cases from the grammar."""
    make_bases(bases)
    found = Tried()
    try_cases(
        make_cases(n, seed),
        folder,
        bases,
        lambda _, case, outcome: found.take(case, outcome),
        lanes=lanes or _lanes(),
        batch=BATCH,
    )
    return found


def _lanes() -> int:
    return min(2, os.cpu_count() or 1)
