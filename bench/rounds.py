"""The order of measurements: the peers' best settings are looked for, both sides pass the gate, then all are timed in
turn. Each measurement is a separate process."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from bench.folders import make_ready
from bench.record import NAMES, Job, Measurement, Setting
from bench.workloads import Library, Workload
from siliang.hardware import describe_device, find_device, has_bf16, versions

DEFAULT = Setting(dtype="fp32", layout="padded")  # of PEFT with the Trainer, without settings
PURPOSES = {"time": ("-time", "-search"), "gate": ("-gate",)}  # in the names of a part's records
Tried = tuple[float, Library, Setting]  # tokens per second


@dataclass
class Plan:
    """How much is measured.

    Attributes:
        steps: Of a timed run; a multiple of 16, which is one round of the length groups at these sizes.
        search_steps: Of each setting tried.
        all_settings: bf16 even where the hardware only imitates it.
        searched: The workloads whose peers' settings are looked for, and that are timed; None: all. The others pass the
            gate alone.
        parts: The gate's losses hold on a busy machine, times do not: they can be had in two goes.
        extra: Settings of siliang's own.
    """

    parts: tuple[Literal["time", "gate"], ...] = ("time", "gate")
    rounds: int = 3
    steps: int = 32
    warmup: int = 3
    search_steps: int = 16
    gate_steps: int = 50
    peers: tuple[Library, ...] = ("peft", "trl")
    all_settings: bool = False
    smoke: bool = False
    searched: tuple[str, ...] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class Bench:
    """Runs workloads and writes a record of each measurement.

    Args:
        records: The folder of records.
        say: Prints a line of progress.
    """

    def __init__(self, plan: Plan, records: Path, say: Callable[[str], None]) -> None:
        self.plan, self.records, self.say = plan, records, say
        self._scratch = tempfile.TemporaryDirectory(prefix="siliang-bench-")
        self.scratch = Path(self._scratch.name)
        self._device = find_device()
        # a fork of a process that has imported everything; CUDA does not survive a fork, and needs a new process
        cuda = self._device.type == "cuda"
        self._context: Any = multiprocessing.get_context("spawn" if cuda or os.name == "nt" else "forkserver")
        if not cuda and os.name != "nt":
            self._context.set_forkserver_preload(["bench.ours", "bench.peer"])

    def close(self) -> None:
        """Removes models and data."""
        self._scratch.cleanup()

    def run(self, workload: Workload, labels: list[str] | None = None) -> None:
        """All measurements of a workload, in place of what an earlier bench left of it."""
        make_ready(workload, self.scratch, smoke=self.plan.smoke)
        for method in workload.methods:
            if labels and method.label not in labels:
                continue
            for old in self.records.glob(f"{workload.name}-{method.label}-*.json"):
                if any(purpose in old.name for part in self.plan.parts for purpose in PURPOSES[part]):
                    old.unlink()
            self._run(workload, method.label)

    def _run(self, workload: Workload, method: str) -> None:
        plan = self.plan
        peers: list[Library] = [p for p in plan.peers if p in workload.layouts and is_there(p)]
        timed = "time" in plan.parts and (plan.searched is None or workload.name in plan.searched)
        tried = self._search(workload, method, peers) if timed else []
        entries = _chosen(workload, tried)
        if "gate" in plan.parts:
            self._gate(workload, method, peers)
        for number in range(1, plan.rounds + 1 if timed else 1):
            self._measure(workload, method, "siliang", Setting(), "time", number)
            for library, setting in entries:
                self._measure(workload, method, library, setting, "time", number)

    def _gate(self, workload: Workload, method: str, peers: list[Library]) -> None:
        self._measure(workload, method, "siliang", Setting(), "gate")
        for peer in peers:
            # grouped by length, the order would be another
            for layout in ("padded", "flat"):
                if layout in workload.layouts[peer]:
                    self._measure(workload, method, peer, DEFAULT.model_copy(update={"layout": layout}), "gate")

    def _search(self, workload: Workload, method: str, peers: list[Library]) -> list[Tried]:
        """The settings of the peers that work, the fastest first."""
        dtypes: list[Any] = ["fp32"]
        if self.plan.all_settings or has_bf16(self._device):
            dtypes += ["bf16 weights", "bf16 autocast"]
        tried: list[Tried] = []
        for peer in peers:
            for setting in (Setting(dtype=d, layout=x) for d in dtypes for x in workload.layouts[peer]):
                found = self._measure(workload, method, peer, setting, "search")
                if not found.error:
                    tried.append((found.tokens_per_s, peer, setting))
        return sorted(tried, key=lambda t: -t[0])

    def _measure(
        self, workload: Workload, method: str, library: Library, setting: Setting, purpose: Any, number: int = 0
    ) -> Measurement:
        plan = self.plan
        warmup = min(plan.warmup, 1) if plan.smoke else plan.warmup
        steps = {"search": plan.search_steps, "gate": plan.gate_steps - warmup, "time": plan.steps}[purpose]
        job = Job(
            workload=workload.name,
            method=method,
            library=library,
            setting=setting,
            purpose=purpose,
            round=number,
            steps=steps,
            warmup=warmup,
            smoke=plan.smoke,
            extra=plan.extra if library == "siliang" else {},
        )
        found = Measurement(
            job=job,
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            command=shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
            device=describe_device(self._device),
            versions=versions() | {name: version(name) for name in ("peft", "trl", "bitsandbytes") if find_spec(name)},
        )
        start = time.perf_counter()
        path, log = self.scratch / f"{job.name}.json", self.scratch / f"{job.name}.log"
        path.write_text(found.model_dump_json(), encoding="utf-8")
        process = self._context.Process(target=run_job, args=(path, log, self.scratch))
        process.start()
        try:
            process.join()
        finally:
            process.terminate()  # nothing, unless the user interrupts
        found = Measurement.model_validate_json(path.read_text(encoding="utf-8"))
        if process.exitcode and not found.error:
            found.error = f"the process ended with {process.exitcode}"
        found.write(self.records)
        what = found.error or f"{found.tokens_per_s:,.0f} tokens/s, {found.above_bytes / 1e6:,.0f} MB above the weights"
        place = f"round {number}" if number else purpose
        self.say(
            f"{workload.name} {method:<7} {place:<8} {NAMES[library]:<14} {setting!s:<22} {what} "
            f"({time.perf_counter() - start:.0f} s)"
        )
        if found.error:
            self.say("    " + "\n    ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-4:]))
        return found


def _chosen(workload: Workload, tried: list[Tried]) -> list[tuple[Library, Setting]]:
    """What is timed: each peer's fastest setting, the fastest of each layout that a target names, PEFT's default.

    Args:
        tried: The fastest first.
    """
    chosen: list[tuple[Library, Setting]] = []
    for _, peer, setting in tried:
        if all(p != peer for p, _ in chosen):
            chosen.append((peer, setting))
    entries: list[tuple[Library, Setting]] = [(peer, setting) for _, peer, setting in tried]
    for layout in (t.against for t in workload.targets):
        chosen += [entry for entry in entries if entry[1].layout == layout][:1]
    chosen += [entry for entry in entries if entry == ("peft", DEFAULT)]
    return [entry for i, entry in enumerate(chosen) if entry not in chosen[:i]]


def is_there(library: Library) -> bool:
    """Whether a library is installed."""
    return library in get_args(Library) and find_spec(library) is not None


def run_job(path: Path, log: Path, scratch: Path) -> None:
    """In the new process: reads the record's job, trains, fills the record.

    Args:
        path: The record's file.
        log: Where the libraries' own words go.
        scratch: The folder of models and data.
    """
    with log.open("w") as opened:
        for number in (1, 2):
            os.dup2(opened.fileno(), number)
    found = Measurement.model_validate_json(path.read_text(encoding="utf-8"))
    if found.job.smoke:
        torch.set_num_threads(1)  # work so small is only held up by threads that wait for each other
        gc.freeze()  # and by looking through all that was imported, each time that garbage is collected
    try:
        if found.job.library == "siliang":
            from bench.ours import measure
        else:
            from bench.peer import measure
        torch.manual_seed(0)
        measure(found, scratch)
    except Exception as error:  # a setting that a peer cannot do is a result
        traceback.print_exc()
        found.error = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    path.write_text(found.model_dump_json(), encoding="utf-8")
