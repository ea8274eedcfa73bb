"""`make faults`: every part at full size, and a table of the results."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from faults.arguments import make_names, try_arguments
from faults.commands import run
from faults.damage import damage_adapters, damage_checkpoints
from faults.disks import try_disks
from faults.endurance import endure
from faults.folders.trial import BY_HAND, Tried, try_by_hand, try_made
from faults.fuzz import HOSTILE, fuzz, hostile_templates
from faults.kills import kill_at_random
from faults.numbers import try_numbers
from faults.runs import Place, make_place

Result = tuple[bool, str]
Part = Callable[[Place, Path, float], Result]


def kills(place: Place, folder: Path, size: float) -> Result:
    """SIGKILL at random moments"""
    c = kill_at_random(place, folder, kills=_n(50, size), seed=1)
    text = f"{c.kills} kills, {c.while_saving} of them inside saving; {c.equal} of {c.runs} runs ended bit for bit as "
    return c.passed, f"{text}undisturbed; {c.corrupted} corrupted run folders"


def checkpoints(place: Place, folder: Path, size: float) -> Result:
    """Checkpoint bit-flipped or cut short"""
    c = damage_checkpoints(place, folder, cases=_n(100, size), seed=2)
    text = f"{c.cases} cases: {c.noticed} passed over with a warning, {c.harmless} without effect, the end equal; "
    return c.passed, f"{text}{c.wrong} wrong"


def adapters(place: Place, folder: Path, size: float) -> Result:
    """Adapter bit-flipped or cut short"""
    c = damage_adapters(place, folder, cases=_n(100, size), seed=3)
    return c.passed, f"{c.cases} cases: {c.noticed} refused by name, {c.harmless} without effect; {c.wrong} wrong"


def disks(place: Place, folder: Path, size: float) -> Result:
    """Disk full, read-only, folder removed"""
    c = try_disks(place, folder)
    left = f"; left out: {', '.join(c.skipped)}" if c.skipped else ""
    return c.passed, f"{c.cases} checks, {len(c.failed)} failed{left}{_lines(c.failed)}"


def numbers(place: Place, folder: Path, size: float) -> Result:
    """nan, inf, 0; out of memory"""
    c = try_numbers(place, folder)
    return c.passed, f"{c.cases} checks, {len(c.failed)} failed{_lines(c.failed)}"


def fuzzing(place: Place, folder: Path, size: float) -> Result:
    """Hostile and broken files"""
    c = fuzz(place, folder, cases=_n(24_000, size), seed=4)
    names = ", ".join(f"{name} {c.worked[name] + n:,}" for name, n in c.refused.items())
    text = f"{c.cases:,} cases ({names}): {c.worked.total():,} worked, {c.refused.total():,} refused, "
    failures = [f"{key}: {content[:200]!r}" for key, (content, _) in c.failures.items()]
    return c.passed, f"{text}{c.n_failures} failures, {len(c.outside)} files outside{_lines(failures)}"


def arguments(place: Place, folder: Path, size: float) -> Result:
    """Command lines of every kind"""
    done = folder / "done"
    flags = ("--model", place.model, "--data", place.data, "--task", "causal_lm", "--output", done)
    assert run("train", *flags, "--set", "train.max_steps=1", "--set", "data.max_length=32").code == 0
    names = make_names(folder / "names", done, Path(place.model), Path(place.data))
    c = try_arguments(names, folder / "work", cases=_n(4_000, size), seconds=3600 * size, seed=5)
    codes = Counter[int]()
    for (_, code), n in c.codes.items():
        codes[code] += n
    failures = [f"{what}: {words}" for what, words in c.failures.items()]
    text = ", ".join(f"{n:,} ended with {code}" for code, n in sorted(codes.items()))
    return not failures, f"{c.cases:,} cases: {text}, {len(failures)} failures{_lines(failures)}"


def templates(place: Place, folder: Path, size: float) -> Result:
    """Malicious chat templates"""
    passed = hostile_templates(place)
    return not passed, f"{len(HOSTILE) - len(passed)} of {len(HOSTILE)} refused{_lines(passed)}"


def folders(place: Place, folder: Path, size: float) -> Result:
    """Malicious folders"""
    bases = folder / "bases"
    parts = [("by hand", _hand(bases, folder / "hand", size))]
    if n := round(20_000 * size):
        (folder / "made").mkdir()
        parts.append(("of a grammar", try_made(bases, folder / "made", n, seed=6)))
    texts = []
    for name, c in parts:
        kinds = ", ".join(f"{kind} {n:,}" for kind, (n, _) in c.by_kind().items())
        most = f"at most {c.slowest[0]:.1f} s of the processor and {c.largest[0] / 1e6:,.0f} MB more memory"
        ended = f"{c.worked.total():,} worked, {c.refused.total():,} refused, {len(c.failures)} failures, {most}"
        lines = _lines([f"{case}: {faults[0][:200]}" for case, faults in list(c.failures.items())[:50]])
        texts.append(f"{c.cases:,} cases {name} ({kinds}): {ended}{lines}")
    return all(c.passed for _, c in parts), "<br>".join(texts)


def _hand(bases: Path, folder: Path, size: float) -> Tried:
    """The hand-written cases: all of them, or a part at a smaller size."""
    folder.mkdir()
    every = max(1, round(1 / size)) if size < 1 else 1
    return try_by_hand(bases, folder, [case for part in BY_HAND.values() for case in part][::every])


def endurance(place: Place, folder: Path, size: float) -> Result:
    """Many steps"""
    c = endure(place, folder, steps=_n(20_000, size))
    memory = f"{c.resident_bytes[len(c.resident_bytes) // 3] / 1e6:,.0f} to {c.resident_bytes[-1] / 1e6:,.0f} MB"
    files = f"{min(c.open_files)} to {max(c.open_files)} open files"
    return c.passed, f"{c.steps:,} steps, 100 checkpoints and evaluations: {memory} (x{c.growth:.3f}), {files}"


PARTS: dict[str, Part] = {
    part.__name__: part
    for part in (kills, checkpoints, adapters, disks, numbers, fuzzing, folders, arguments, templates, endurance)
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS), help="some of the parts")
    parser.add_argument("--size", type=float, default=1.0, help="share of the cases")
    arguments = parser.parse_args()
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    warnings.filterwarnings("ignore")
    disable_progress_bar()
    names = ("siliang", "torch", "transformers", "safetensors", "hypothesis")
    print(f"{datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}, ", end="")
    print(", ".join(f"{name} {version(name)}" for name in names) + "\n")
    print("| what | result | seconds |\n| --- | --- | --- |")
    good = True
    for name in arguments.only:
        part = PARTS[name]
        with tempfile.TemporaryDirectory(prefix="siliang-faults-") as folder:
            place = make_place(Path(folder) / "place")
            inner = Path(folder) / "runs"
            inner.mkdir()
            started = time.perf_counter()
            passed, text = part(place, inner, arguments.size)
        good = good and passed
        text = f"{'' if passed else 'FAILED: '}{text}"
        print(f"| {part.__doc__} | {text} | {time.perf_counter() - started:.0f} |", flush=True)
    return 0 if good else 1


def _n(cases: int, size: float) -> int:
    return max(1, round(cases * size))


def _lines(failures: list[str]) -> str:
    return "".join(f"<br>{' '.join(failure.split())}" for failure in failures)


if __name__ == "__main__":
    sys.exit(main())
