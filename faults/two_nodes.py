"""`make cluster-test`: one training on two nodes. They are two network namespaces of this machine with a cable between
them, so that their processes hear of each other over the network alone; the run's folder is on a disk that both see.

All of it runs in namespaces of its own, which the kernel takes away, with the cable and every process left in them, as
soon as this process ends, however it ends.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml
from transformers.utils.logging import disable_progress_bar

from faults.runs import Place, Seen, damaged_parts, make_place
from siliang.records import Record

APART = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
CABLE = ("ip", "link", "add", "siliang0", "type", "veth", "peer", "name", "siliang1")
PORT = 29400
PATIENCE_S = 240.0
ENV = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
SHORT: dict[str, Any] = {"max_steps": 20, "log_every": 1}
LONG: dict[str, Any] = {"max_steps": 400, "log_every": 20, "save_every": 20}


def why_not() -> str | None:
    """The reason why this machine does not allow it; None if it does."""
    if missing := [tool for tool in ("unshare", "nsenter", "ip") if not shutil.which(tool)]:
        return f"{' and '.join(missing)} not found (util-linux, iproute2)"
    tried = subprocess.run([*APART, *CABLE], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"no namespaces of our own: {tried.stderr.strip().splitlines()[-1:]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults.two_nodes", description=__doc__)
    parser.add_argument("--only", default="", help="part of the names of the cases that are wanted")
    parser.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.apart:
        return _apart(arguments.only)
    if (reason := why_not()) is not None:
        print(f"skipped    two nodes: {reason}")
        return 0
    command = [*APART, sys.executable, "-m", "faults.two_nodes", "--apart", "--only", arguments.only]
    with subprocess.Popen(command) as inner:
        try:
            return inner.wait()
        except KeyboardInterrupt:
            inner.kill()  # and with it, by --kill-child, all that it has started
            return 130


@dataclass(frozen=True)
class Node:
    """A network namespace with one end of the cable; process `holder` keeps it open."""

    number: int
    holder: int

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number + 1}"

    @property
    def end(self) -> str:
        return f"siliang{self.number}"

    def run(self, *command: str) -> str:
        done = subprocess.run([*self.inside, *command], check=True, capture_output=True, text=True)
        return done.stdout

    @property
    def inside(self) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.holder}/ns/net"]

    def sent_bytes(self) -> int:
        """Bytes sent over the cable since the start."""
        found = re.search(rf"{self.end}:(?:\s+\d+){{8}}\s+(\d+)", self.run("cat", "/proc/self/net/dev"))
        assert found is not None
        return int(found[1])

    def start(self, run: Path, *, restarts: int, needed: str) -> Job:
        """torchrun with one process, which trains as `run`/run.yaml says."""
        logs = Path(tempfile.mkdtemp(prefix=f"node-{self.number}-", dir=run))
        torchrun = ["--nnodes", needed, "--nproc-per-node", "1", "--max-restarts", str(restarts)]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"10.77.0.1:{PORT}", "--rdzv-id", run.name]
        # both have this machine's name: neither could tell from it which of them is the endpoint
        torchrun += ["--rdzv-conf", f"is_host={int(self.number == 0)},last_call_timeout=3"]
        torchrun += ["--local-addr", self.address, "--monitor-interval", "0.2"]
        torchrun += ["--log-dir", str(logs), "--redirects", "3"]
        arguments = [*torchrun, "-m", "siliang", "train", str(run / "run.yaml")]
        with (logs / "torchrun.log").open("w") as log:
            process = subprocess.Popen(
                [*self.inside, sys.executable, "-m", "torch.distributed.run", *arguments],
                env=ENV | {"GLOO_SOCKET_IFNAME": self.end},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return Job(process, logs)


@dataclass
class Job:
    """A node's torchrun, and the log of its process."""

    torchrun: subprocess.Popen[bytes]
    logs: Path

    def trainer(self) -> psutil.Process:
        """The training process."""
        return next(
            child
            for child in psutil.Process(self.torchrun.pid).children(recursive=True)
            if child.environ().get("RANK") is not None
        )

    def kill_all(self) -> None:
        """Kills torchrun and its processes, as at a power failure."""
        for process in (psutil.Process(self.torchrun.pid), *psutil.Process(self.torchrun.pid).children(recursive=True)):
            process.kill()

    def output(self) -> str:
        """The output of the trainings, of every start, without torchrun's."""
        found = sorted([*self.logs.glob("*/attempt_*/*/stdout.log"), *self.logs.glob("*/attempt_*/*/stderr.log")])
        return "".join(path.read_text(errors="replace") for path in found)

    def end(self) -> int:
        """Waits for the end, and returns torchrun's exit code; one that hangs is killed."""
        try:
            return self.torchrun.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill_all()
            return -signal.SIGALRM


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes with a cable; only within `APART`."""
    with ExitStack() as stack:
        nodes = []
        for number in range(2):
            holder = stack.enter_context(subprocess.Popen(["unshare", "--net", "sleep", "infinity"]))
            stack.callback(holder.kill)
            nodes.append(Node(number, holder.pid))
        own = Path("/proc/self/ns/net").readlink()
        while any(Path(f"/proc/{node.holder}/ns/net").readlink() == own for node in nodes):
            time.sleep(0.01)
        subprocess.run(CABLE, check=True)
        for node in nodes:
            subprocess.run(["ip", "link", "set", node.end, "netns", str(node.holder)], check=True)
            node.run("ip", "address", "add", f"{node.address}/24", "dev", node.end)
            for device in ("lo", node.end):
                node.run("ip", "link", "set", device, "up")
        yield nodes[0], nodes[1]


class Started(NamedTuple):
    """A run's folder, and each node's job."""

    run: Path
    jobs: list[Job]


def written(place: Place, folder: Path, strategy: str = "ddp", **train: Any) -> Path:
    """A folder with run.yaml, whose output is in the same folder."""
    folder.mkdir(parents=True)
    values = place.config(folder / "run", **train).model_dump(mode="json")
    values["method"] = {"name": "lora", "r": 4}
    values["distributed"] = {"strategy": strategy}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder


def wait_for_checkpoint(run: Path, job: Job, beyond: int = 0) -> bool:
    """Until a checkpoint of a step after `beyond` is there; whether it came before the job's end."""
    until = time.monotonic() + PATIENCE_S
    while job.torchrun.poll() is None and time.monotonic() < until:
        found = [int(p.name.partition("-")[2]) for p in run.glob("run/checkpoints/checkpoint-*")]
        if max(found, default=0) > beyond:
            return True
        time.sleep(0.05)
    return False


def try_two_nodes(place: Place, folder: Path, *, only: str = "") -> Seen:
    """Tries each case whose name contains `only` once, and prints its result."""
    seen = Seen()
    alone = [sys.executable, "-m", "siliang", "train"]
    for name, settings in (("one", SHORT), ("long", LONG)):
        written(place, folder / name, **settings)
        subprocess.run([*alone, str(folder / name / "run.yaml")], env=ENV, check=True, capture_output=True)
    with two_nodes() as nodes:
        for name, case in CASES.items():
            if only not in name:
                continue
            failed, shown = len(seen.failed), ""
            try:
                shown = case(Try(name, seen, place, folder, nodes))
            except psutil.NoSuchProcess as error:  # what was to be killed had ended by itself
                seen.see(name, False, error)
            print(f"{name:<44} {shown if len(seen.failed) == failed else 'FAILED'}", flush=True)
    return seen


@dataclass(frozen=True)
class Try:
    """One case: its name, where it counts its checks, and what it trains with."""

    name: str
    seen: Seen
    place: Place
    folder: Path
    nodes: tuple[Node, Node]

    def see(self, right: bool, what: object = "") -> bool:
        self.seen.see(self.name, right, what)
        return right

    def start(self, strategy: str = "ddp", *, restarts: int = 0, needed: str = "2", **train: object) -> Started:
        """The same training on both nodes."""
        run = written(self.place, self.folder / self.name.replace(" ", "-"), strategy, **train)
        return Started(run, [node.start(run, restarts=restarts, needed=needed) for node in self.nodes])

    def same(self, name: str, run: Path) -> str:
        """Whether the run has the losses of the one called `name`; by how much they differ at most."""
        files = self.folder / name / "run", run / "run"
        a, b = ({s.step: s.loss for s in Record.read(f).steps if s.loss is not None} for f in files)
        off = max((abs(a[step] - b.get(step, float("inf"))) for step in a), default=float("inf"))
        self.see(len(a) >= 20 and off < 1e-4, f"{len(a)} losses differ by {off:.1e}")
        return f"{len(a)} losses within {off:.0e} of one process's"


def as_one(case: Try, strategy: str) -> str:
    before = case.nodes[0].sent_bytes()
    run, jobs = case.start(strategy, **SHORT)
    codes = [job.end() for job in jobs]
    if not case.see(codes == [0, 0], jobs[0].output()[-600:]):
        return ""
    sent = case.nodes[0].sent_bytes() - before
    return f"{case.same('one', run)}; {sent / 1e3:,.0f} kB sent by node 0"


def killed(case: Try, number: int) -> str:
    """The other node reports it and ends; saved files are intact."""
    run, jobs = case.start(**LONG)
    case.see(wait_for_checkpoint(run, jobs[0]), f"no checkpoint: {jobs[0].output()[-600:]}")
    other = jobs[1 - number]
    jobs[number].trainer().kill()
    started = time.monotonic()
    code, output = other.end(), other.output()
    took_s = time.monotonic() - started
    jobs[number].end()
    right = "error[SLE12]" in output and f"Rank {1 - number} of 2 has lost another rank" in output
    case.see(right and code > 0 and "Traceback" not in output, output[-600:])
    case.see(not damaged_parts(run / "run"), damaged_parts(run / "run"))
    words = re.search(r"error\[\w+\].*", output)
    return f"the other ended after {took_s:.1f} s: {words[0] if words else 'without a word'}"


def begins_again(case: Try) -> str:
    """By torchrun's restarts, which tell a node whose own process lived nothing."""
    run, jobs = case.start(restarts=3, **LONG)
    for number, step in ((1, 0), (0, 150)):
        saved = wait_for_checkpoint(run, jobs[0], step)
        if case.see(saved, f"no checkpoint beyond step {step}: {jobs[0].output()[-600:]}"):
            jobs[number].trainer().kill()
    codes = [job.end() for job in jobs]
    if not case.see(codes == [0, 0], f"{codes} {jobs[0].output()[-600:]}"):
        return ""
    return f"went on by itself, twice; {case.same('long', run)}"


def goes_on_alone(case: Try) -> str:
    """A node is lost with its torchrun, and the training continues on the other."""
    run, jobs = case.start(restarts=3, needed="1:2", **LONG)
    case.see(wait_for_checkpoint(run, jobs[0]), f"no checkpoint: {jobs[0].output()[-600:]}")
    began = jobs[0].trainer().environ()["WORLD_SIZE"]
    jobs[1].kill_all()
    jobs[1].end()
    code = jobs[0].end()
    if not case.see(code == 0 and began == "2", f"{code}, began with {began}: {jobs[0].output()[-600:]}"):
        return ""
    return f"node 0 went on with one process; {case.same('long', run)}"


CASES: dict[str, Callable[[Try], str]] = {
    "ddp": partial(as_one, strategy="ddp"),
    "fsdp": partial(as_one, strategy="fsdp"),
    "node 0's process killed": partial(killed, number=0),
    "node 1's process killed": partial(killed, number=1),
    "one of each killed, --max-restarts 3": begins_again,
    "node 1 lost, --nnodes 1:2": goes_on_alone,
}


def _apart(only: str) -> int:
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="siliang-nodes-") as folder:
        place = make_place(Path(folder) / "place", dropout=0.0)
        started = time.monotonic()
        seen = try_two_nodes(place, Path(folder) / "runs", only=only)
    for failure in seen.failed:
        print(f"FAILED     {' '.join(failure.split())}")
    print(f"{seen.cases} checks, {len(seen.failed)} failed, {time.monotonic() - started:.0f} s")
    return 0 if seen.passed else 1


if __name__ == "__main__":
    sys.exit(main())
