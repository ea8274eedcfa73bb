"""Disks that fill up, are read-only, or whose folders go away under a run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from faults.runs import Child, Place, Seen, damaged_parts, outcome, run


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """A disk of that size at `folder`; False where it cannot be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    mounted = sys.platform == "linux" and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def try_disks(place: Place, folder: Path) -> Seen:
    """Tries each case once."""
    seen = Seen()
    assert run(place.config(folder / "peace")).code == 0
    wanted = outcome(folder / "peace")
    _removed(seen, place, folder)
    with small_disk(folder / "full", "2m") as mounted:
        if mounted:
            _full(seen, place, folder / "full", wanted)
        else:
            seen.skipped.append("disk full: no small disk can be mounted here")
    with small_disk(folder / "read-only", "8m") as mounted:
        if mounted:
            _read_only(seen, place, folder / "read-only", wanted)
        else:
            seen.skipped.append("disk read-only: none can be mounted here")
    return seen


def _full(seen: Seen, place: Place, disk: Path, wanted: object) -> None:
    """The disk fills up during a run; after space is freed the run resumes."""
    config = place.config(disk / "run")
    child = Child(config, pace_s=0.02)
    child.wait_for("step 8\n")
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as opened:
        try:
            while True:
                opened.write(bytes(4096))
        except OSError:
            pass
    ending = child.end()
    seen.see("disk full", ending.code == 2 and "the disk is full. Make room" in ending.output, ending.output[-300:])
    seen.see("disk full: what was saved", not damaged_parts(disk / "run"), damaged_parts(disk / "run"))
    filler.unlink()
    again = run(config, resume=True)
    seen.see("disk full: going on", again.code == 0 and outcome(disk / "run") == wanted, again.output[-300:])


def _read_only(seen: Seen, place: Place, disk: Path, wanted: object) -> None:
    config = place.config(disk / "run")
    child = Child(config, pace_s=0.02)
    child.wait_for("step 8\n")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    ending = child.end()
    seen.see("read-only", ending.code == 2 and "the disk is read-only" in ending.output, ending.output[-300:])
    fresh = run(place.config(disk / "other"))
    seen.see("read-only from the start", fresh.code == 2 and "cannot be created" in fresh.output, fresh.output[-300:])
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    seen.see("read-only: what was saved", not damaged_parts(disk / "run"), damaged_parts(disk / "run"))
    again = run(config, resume=True)
    seen.see("read-only: going on", again.code == 0 and outcome(disk / "run") == wanted, again.output[-300:])


def _removed(seen: Seen, place: Place, folder: Path) -> None:
    """The folder is removed, and is not created again with half a run in it."""
    child = Child(place.config(folder / "removed"), pace_s=0.02)
    child.wait_for("step 8\n")
    shutil.rmtree(folder / "removed", ignore_errors=True)
    shutil.rmtree(folder / "removed", ignore_errors=True)  # what was being written at that moment
    ending = child.end()
    seen.see("removed", ending.code == 2 and "the folder was removed or renamed" in ending.output, ending.output[-300:])
    seen.see("removed: nothing is left", not (folder / "removed").exists())
