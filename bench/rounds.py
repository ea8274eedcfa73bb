"""The order of measurements: the peers' best settings are looked for, both sides pass the gate, then all are timed in
turn. Each measurement is a separate process; those that are timed import everything themselves."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from bench.environments import ENVIRONMENTS, KERNEL_CACHES, ROOT, python_of, variables, versions_in
from bench.folders import make_ready
from bench.record import NAMES, Job, Measurement, Setting, code_sha256, instructions, read_records
from bench.settings import DEFAULT, Tried, chosen, search, trains
from bench.workloads import Library, Workload
from siliang.hardware import describe_device, find_device, has_bf16, versions

PURPOSES = {"time": ("time", "search"), "gate": ("gate",)}  # of a part's records


@dataclass
class Plan:
    """How much is measured.

    Attributes:
        steps: Of a timed run; None: as many as the workload says.
        all_settings: bf16 even where the hardware only imitates it.
        searched: The workloads whose peers' settings are looked for, and that are timed; None: all. The others pass the
            gate alone.
        pinned: Settings of peers that are not looked for; then nothing else is timed, not their defaults either.
        parts: The gate's losses hold on a busy machine, times do not: they can be had in two goes.
        again: Measure again what has a record already.
        extra: Settings of siliang's own.
    """

    parts: tuple[Literal["time", "gate"], ...] = ("time", "gate")
    rounds: int = 2
    steps: int | None = None
    warmup: int = 3
    gate_steps: int = 50
    peers: tuple[Library, ...] = ("peft", "trl", "unsloth", "swift")
    all_settings: bool = False
    smoke: bool = False
    searched: tuple[str, ...] | None = None
    pinned: dict[Library, Setting] = field(default_factory=dict)
    again: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


class Bench:
    """Runs workloads and writes a record of each measurement. What the records have already is not measured again, as
    long as neither the code nor the libraries have changed.

    Args:
        records: The folder of records.
        say: Prints a line of progress.
    """

    def __init__(self, plan: Plan, records: Path, say: Callable[[str], None]) -> None:
        self.plan, self.records, self.say = plan, records, say
        self._scratch = tempfile.TemporaryDirectory(prefix="siliang-bench-")
        self.scratch = Path(self._scratch.name)
        self._device = find_device()
        self._code, self._instructions = code_sha256(), instructions()
        self._kept: dict[str, Measurement] = {}
        # a fork of a process that has imported everything; CUDA does not survive a fork, and needs a new process
        cuda = self._device.type == "cuda"
        self._context: Any = multiprocessing.get_context("spawn" if cuda or os.name == "nt" else "forkserver")
        if not cuda and os.name != "nt":
            self._context.set_forkserver_preload(["bench.ours", "bench.peer", "bench.trl_trainers"])

    def close(self) -> None:
        """Removes models and data."""
        self._scratch.cleanup()

    def run(self, workload: Workload, labels: list[str] | None = None) -> None:
        """All measurements of a workload, in place of what an earlier bench of other code left of it."""
        make_ready(workload, self.scratch, smoke=self.plan.smoke)
        for method in workload.methods:
            if not labels or method.label in labels:
                self._keep(workload, method.label)
                self._run(workload, method.label)

    def _keep(self, workload: Workload, method: str) -> None:
        """Finds the records that still hold, and removes the others."""
        purposes = {purpose for part in self.plan.parts for purpose in PURPOSES[part]}
        for old in read_records(self.records, f"{workload.name}-{method}-*.json"):
            if old.job.purpose in purposes and (self.plan.again or not self._holds(old)):
                (self.records / f"{old.job.name}.json").unlink()
            else:
                self._kept[old.job.name] = old

    def _holds(self, old: Measurement) -> bool:
        return (
            old.code == self._code
            and old.instructions == self._instructions
            and old.versions == libraries(old.job.library)
            and old.device == describe_device(self._device)
        )

    def _run(self, workload: Workload, method: str) -> None:
        plan = self.plan
        peers: list[Library] = [
            p for p in plan.peers if p in workload.layouts and trains(p, workload.method(method)) and is_there(p)
        ]
        timed = "time" in plan.parts and (plan.searched is None or workload.name in plan.searched)
        tried = self._search(workload, method, peers) if timed else []
        entries = chosen(workload, tried, [] if plan.pinned else peers)
        if "gate" in plan.parts:
            self._gate(workload, method, peers)
        for number in range(1, plan.rounds + 1 if timed else 1):
            self._measure(workload, method, "siliang", Setting(), "time", number)
            for library, setting in entries:
                if number == 1 or setting != DEFAULT or (library, setting) in [t[1:] for t in tried]:
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
        tried: list[Tried] = []
        for peer in peers:
            if peer in self.plan.pinned:
                tried.append((0.0, peer, self.plan.pinned[peer]))
                continue

            def speed(setting: Setting, peer: Library = peer) -> float | None:
                found = self._measure(workload, method, peer, setting, "search")
                return None if found.error else found.tokens_per_s

            bf16 = self.plan.all_settings or has_bf16(self._device)
            tried += search(peer, workload, speed, bf16=bf16)
        return sorted(tried, key=lambda t: -t[0])

    def _measure(
        self, workload: Workload, method: str, library: Library, setting: Setting, purpose: Any, number: int = 0
    ) -> Measurement:
        plan = self.plan
        warmup = 1 if plan.smoke else plan.warmup
        timed_steps = plan.steps or workload.steps
        steps = {"search": workload.search_steps, "gate": plan.gate_steps - warmup, "time": timed_steps}[purpose]
        job = Job(
            workload=workload.name,
            method=method,
            library=library,
            setting=setting,
            purpose=purpose,
            round=number,
            steps=2 if plan.smoke and purpose != "gate" else steps,
            warmup=warmup,
            batch=workload.gate_batch if purpose == "gate" else None,
            smoke=plan.smoke,
            extra=plan.extra if library == "siliang" else {},
        )
        start, kept = time.perf_counter(), self._kept.get(job.name)
        if kept is not None and kept.job == job:
            found = kept
        else:
            found = self._in_a_process(job)
            found.write(self.records)
        what = found.error or f"{found.tokens_per_s:,.0f} tokens/s, {found.above_bytes / 1e6:,.0f} MB above the weights"
        place = f"round {number}" if number else purpose
        seconds = "kept" if found is kept else f"{time.perf_counter() - start:.0f} s"
        self.say(f"{workload.name} {method:<7} {place:<8} {NAMES[library]:<14} {setting!s:<22} {what} ({seconds})")
        log = self.scratch / f"{job.name}.log"
        if found.error and log.is_file():
            self.say("    " + "\n    ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-4:]))
        return found

    def _in_a_process(self, job: Job) -> Measurement:
        """Runs a job in a process; returns its record."""
        found = Measurement(
            job=job,
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            command=shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
            device=describe_device(self._device),
            versions=libraries(job.library),
            instructions=self._instructions,
            code=self._code,
        )
        path, log = self.scratch / f"{job.name}.json", self.scratch / f"{job.name}.log"
        path.write_text(found.model_dump_json(), encoding="utf-8")
        if job.library in ENVIRONMENTS or (job.purpose == "time" and not job.smoke):
            code = self._new_process(job, path, log)
        else:
            code = self._fork(path, log)
        found = Measurement.model_validate_json(path.read_text(encoding="utf-8"))
        if code and not found.error:
            found.error = f"the process ended with {code}"
        return found

    def _fork(self, path: Path, log: Path) -> int:
        process = self._context.Process(target=run_forked, args=(path, log, self.scratch))
        process.start()
        try:
            process.join()
        finally:
            process.terminate()  # nothing, unless the user interrupts
        return process.exitcode

    def _new_process(self, job: Job, path: Path, log: Path) -> int:
        environment = ENVIRONMENTS.get(job.library)
        python = str(python_of(job.library)) if environment else sys.executable
        first = environment.first if environment else ()
        # a first run each time: siliang keeps plans and tokens
        variables_of_job = variables() | {"SILIANG_CACHE": str(self.scratch / f"{job.name}-cache")}
        if job.library != "siliang":
            variables_of_job |= KERNEL_CACHES
        if job.library == "unsloth":
            from bench.unsloth_settings import variables_of

            variables_of_job |= variables_of(job, native_bf16=has_bf16(self._device))
        command = [python, "-m", "bench.job", str(path), str(self.scratch), repr(time.time()), *first]
        with log.open("w") as opened:
            process = subprocess.Popen(command, cwd=ROOT, env=variables_of_job, stdout=opened, stderr=subprocess.STDOUT)
            try:
                return process.wait()
            finally:
                process.terminate()  # nothing, unless the user interrupts


@cache
def libraries(library: Library) -> dict[str, str]:
    """The versions that a library is measured with."""
    own = versions() | {name: version(name) for name in ("peft", "trl", "bitsandbytes") if find_spec(name)}
    return own | versions_in(python_of(library)) if library in ENVIRONMENTS else own


def is_there(library: Library) -> bool:
    """Whether a library is installed, or can be, in an environment of its own."""
    return not why_missing(library)


@cache
def why_missing(library: Library) -> str:
    """Why a library cannot be measured; nothing if it can."""
    if library not in ENVIRONMENTS:
        return "" if find_spec(library) is not None else "it is not installed: pip install 'siliang[bench]'"
    try:
        python_of(library)
    except subprocess.CalledProcessError as error:
        return f"its environment could not be made: {(error.stderr or str(error)).strip().splitlines()[-1]}"
    return ""


def run_forked(path: Path, log: Path, scratch: Path) -> None:
    """Runs a job in this process, a fork, whose words go into the log."""
    from bench.job import run_job

    with log.open("w") as opened:
        for number in (1, 2):
            os.dup2(opened.fileno(), number)
    run_job(path, scratch, time.time())
