"""The machines of a Ray cluster, as seen from the one that asks: `Pool`'s place is taken by tasks, one a request."""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from siliang.check import look_at
from siliang.compare.freight import Crate, Freight, freight_of, named_files, pack, pack_folder
from siliang.compare.node import Bell, Job, own_versions, serve
from siliang.compare.pool import STOP_S, Event, threads_each
from siliang.compare.received import Incoming, checked
from siliang.compare.trials import MOST_ATTEMPTS, goes_on
from siliang.config import RunConfig
from siliang.files import sweep
from siliang.hardware import machine
from siliang.paths import check_links
from siliang.permissions import VARIABLE as ALLOWED_CODE
from siliang.plan import plan
from siliang.plan.device import find_target
from siliang.types import ClusterError, SiliangError, first_line
from siliang.units import show_bytes

LOCAL = "local"  # in place of an address: a Ray of our own on this machine
PROBE_S = 45.0  # for a cluster to answer
KNOCK_S = 5.0  # for its machine to
LOOK_S = 0.2
SAY_WAITING_S = 15.0
EXTRA_BYTES = 2**30  # for what in a run's folder is no weight
UNKNOWN_BYTES = 2**40  # that a run's folder may have where the base model's size is not known here
STORE_BYTES = 2**27  # of a Ray of our own: little goes through its object store
CARRIED = (
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_ENDPOINT",
    ALLOWED_CODE,
)  # to the workers, where the user has set them


class Cluster:
    """Has requests done by Ray tasks; for the life of a `with` block.

    Args:
        address: Of the cluster, or `local`.
        jobs: Runs at the same time on each machine; on the CPU each has its share of as many threads as this machine
            has, so that figures are those of `Pool` with as many jobs.
        logs: Folder for what the workers' libraries print.
        say: Hears what the user should know.
        apart: Machines take copies of all files, as they do where no disk is shared.

    Raises:
        ClusterError: Ray is not installed, or no cluster answers at that address.
    """

    def __init__(
        self,
        address: str,
        jobs: int,
        logs: Path,
        say: Callable[[str], None] = lambda line: None,
        *,
        apart: bool = False,
    ) -> None:
        if find_spec("ray") is None:
            raise ClusterError("--ray needs Ray, which is not installed: pip install 'siliang[cluster]'.")
        if address == LOCAL:
            address = os.environ.get("RAY_ADDRESS") or LOCAL
        if address != LOCAL:
            _take_token()
            if not _is_joined():
                _probe(address)
        self._address, self._jobs, self._logs, self._say, self._apart = address, jobs, logs, say, apart
        self._sign = logs.parent / f".here-{uuid.uuid4().hex}"
        self._threads = threads_each(jobs)
        self._freights: dict[str, Freight | None] = {}
        self._crates: dict[str, Crate] = {}
        self._planned: dict[str, int] = {}
        self._going: dict[Any, _Going] = {}
        self._ours = False

    def __enter__(self) -> Self:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        import ray

        worker: Any = import_module("ray._private.worker")
        worker._worker_logs_enabled = False  # log_to_driver=False leaves a paragraph on every lost worker
        self._ours = not _is_joined()
        if self._ours:
            _begin(self._address, self._jobs, self._threads)
        self._sign.touch()
        self._nodes = [n for n in ray.nodes() if n["Alive"]]
        self._resources = self._share()
        self._serve: Any = ray.remote(num_returns="streaming", max_retries=0)(serve)
        bell: Any = ray.remote(num_cpus=0)(Bell)
        self._bell = bell.remote()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        try:
            self._stop()
        finally:
            self._sign.unlink(missing_ok=True)
            if self._ours:
                ray.shutdown()

    def run(self, requests: Iterable[dict[str, Any]]) -> Iterator[Event]:
        """Has all requests done, wherever there is room, and tells what happens as it happens.

        One whose process or machine is gone is done again, on another machine where there is one: `lost`.
        """
        waiting = deque(_Going(number, request) for number, request in enumerate(requests))
        self._lost, said, since = Counter[int](), False, time.monotonic()
        while waiting or self._going:
            if waiting:
                self._begin(waiting.popleft())
            for going, message in self._hear(0 if waiting else LOOK_S):
                yield from self._answer(going, message, waiting)
            if any(going.node for going in self._going.values()):
                since = time.monotonic()
            elif self._going and not said and time.monotonic() - since > SAY_WAITING_S:
                said = True
                self._say(f"waiting    for room in the cluster: a run takes {_in_words(self._resources)}")

    # ---- what the tasks say ----

    def _hear(self, seconds: float) -> Iterator[tuple[_Going, dict[str, Any]]]:
        """The next words of each task that has said something; an error in words of ours."""
        import ray
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        if not self._going:
            return
        streams: list[Any] = list(self._going)
        ray.wait(streams, num_returns=1, timeout=seconds)
        found, _ = ray.wait(streams, num_returns=len(streams), timeout=0)
        ready: list[Any] = list(found)
        for stream in ready:
            going = self._going[stream]
            try:
                message = checked(ray.get(next(stream)))
            except StopIteration:
                message = {"kind": "lost", "error": "it ended without a word"}
            except TaskCancelledError:
                message = {"kind": "failed", "error": "stopped"}
            except RayTaskError as error:
                message = {"kind": "failed", "error": first_line(error.cause or error, kind=True)}
            except RayError as error:
                message = {"kind": "lost", "error": _why_lost(error)}
            if message["kind"] in ("wants", "lost", "died", "done", "failed"):
                del self._going[stream]
            yield going, message

    def _answer(self, going: _Going, message: dict[str, Any], waiting: deque[_Going]) -> Iterator[Event]:
        match message["kind"]:
            case "began":
                going.node, going.node_id = message["node"], message["node_id"]
                self._compare_versions(going.node, message["versions"])
                yield Event("began", going.number, message)
            case "wants":
                self._give(going, message)
                waiting.appendleft(going)
            case "file" | "folder":
                going.receive(message)
            case "lost" | "died":
                self._lost[going.number] += 1
                where = f" on {going.node}" if going.node else ""
                error = f"{message['error']}{where}"
                if self._lost[going.number] < MOST_ATTEMPTS:
                    yield Event("lost", going.number, {"kind": "lost", "error": error})
                    waiting.appendleft(going.again())
                else:
                    tries = f"begun {MOST_ATTEMPTS} times, and each time its process was lost; the last time: "
                    yield Event("died", going.number, {"kind": "died", "error": tries + error})
            case "done" if going.incomplete:
                yield from self._answer(going, {"kind": "lost", "error": "its files did not come back whole"}, waiting)
            case kind:
                if kind == "progress" and len(self._nodes) > 1:
                    message["progress"]["node"] = going.node
                yield Event(kind, going.number, message)

    def _compare_versions(self, node: str, there: dict[str, str]) -> None:
        for name, here in own_versions().items():
            if name != "siliang" and (other := there.get(name, "none")) != here:
                self._say(f"warning    {node} has {name} {other}, this machine {here}: figures may differ")

    def _stop(self) -> None:
        """Has what is under way save itself and come back."""
        import ray

        if not self._going:
            return
        self._bell.ring.remote()
        for stream, going in list(self._going.items()):
            if not going.node:
                ray.cancel(stream)
                del self._going[stream]
        until = time.monotonic() + STOP_S
        while self._going and time.monotonic() < until:
            for going, message in self._hear(LOOK_S):
                with suppress(ClusterError):  # one is enough to end with
                    going.receive(message)
        for stream in self._going:
            ray.cancel(stream, force=True)

    # ---- what the tasks get ----

    def _begin(self, going: _Going) -> None:
        config = going.request["config"]
        for name in named_files(config):
            if name not in self._freights:
                self._freights[name] = freight_of(name)
        if going.folder.parent.is_dir():
            sweep(going.folder.parent, re.escape(going.folder.name))  # of a comparison that was killed
        going.most_bytes = self._most_bytes(config)
        freights = [f for name in named_files(config) if (f := self._freights[name]) is not None]
        job = Job(
            request=going.request,
            freights=tuple(freights),
            sign=str(self._sign.absolute()),
            apart=self._apart,
            work=str(Path.cwd()),
            logs=str(self._logs),
            environment=self._environment(),
            versions=own_versions(),
            bell=self._bell,
            crates={f.given: self._crates[f.given] for f in freights if f.given in self._crates},
            begun=going.begun,
        )
        options: dict[str, Any] = dict(self._resources)
        if memory := self._memory(config):
            options["memory"] = memory
        if going.avoid:
            from ray.util.scheduling_strategies import NodeLabelSchedulingStrategy, NotIn

            options["scheduling_strategy"] = NodeLabelSchedulingStrategy(
                hard={}, soft={"ray.io/node-id": NotIn(*going.avoid)}
            )
        self._going[self._serve.options(**options).remote(job)] = going

    def _give(self, going: _Going, message: dict[str, Any]) -> None:
        """Puts files into the object store, once, for a machine that does not have them."""
        import ray

        for name in (n for n in named_files(going.request["config"]) if n in message["files"]):
            freight = self._freights[name]
            if freight is not None and name not in self._crates:
                check_links(Path(freight.root) / freight.name, ClusterError)  # what is the user's own stays here
                nbytes = sum(nbytes for _, nbytes, _ in freight.files)
                self._say(f"files      {name} goes to the machines that do not have it ({show_bytes(nbytes)})")
                self._crates[name] = pack(Path(freight.root), [n for n, *_ in freight.files], ray.put)
        if message["run"]:
            going.begun = pack_folder(going.folder, ray.put)

    def _most_bytes(self, config: dict[str, Any]) -> int:
        """More than a run's folder can have: its weights in fp32, at its end and in each checkpoint, there with two
        moments of Adam's."""
        freight = self._freights[config["model"]]
        if freight is None:
            return UNKNOWN_BYTES
        weights = 4 * sum(nbytes for _, nbytes, _ in freight.files)  # of 8 bits
        return EXTRA_BYTES + weights * (1 + 3 * (config["train"]["keep"] + 2))

    def _environment(self) -> dict[str, str]:
        carried = {name: os.environ[name] for name in CARRIED if name in os.environ}
        return carried | {"OMP_NUM_THREADS": str(max(1, int(self._resources["num_cpus"])))}

    def _share(self) -> dict[str, float]:
        """What each run takes: a card where there are any, or its share of a machine's processor."""
        sizes = [(int(n["Resources"].get("CPU", 0)), int(n["Resources"].get("GPU", 0))) for n in self._nodes]
        machines = f"{len(sizes)} machines" if len(sizes) > 1 else "this machine"
        if with_cards := [(cpus, cards) for cpus, cards in sizes if cards]:
            each = min(cpus // cards for cpus, cards in with_cards)
            self._say(f"cluster    Ray on {machines}: {sum(c for _, c in sizes)} runs at a time, each with its card")
            return {"num_cpus": max(0, min(self._threads, each)), "num_gpus": 1}
        largest = max((cpus for cpus, _ in sizes), default=0)
        if largest == 0:
            raise ClusterError("The cluster offers no processors: begin its machines without --num-cpus=0.")
        cpus = min(self._threads, largest)
        places = sum(c // cpus for c, _ in sizes)
        runs = "1 run" if places == 1 else f"{places} runs"
        self._say(f"cluster    Ray on {machines}: {runs} at a time, with {_threads_in_words(cpus)} each")
        if cpus < self._threads:
            self._say(f"warning    no machine has {self._threads} processors as this one: last digits may differ")
        return {"num_cpus": cpus}

    def _memory(self, config: dict[str, Any]) -> int:
        """Bytes of main memory that a run takes, by the plan; never more than a machine has, where the run says itself
        that it does not fit. 0 where no plan can be made."""
        most = max((int(n["Resources"].get("memory", 0)) for n in self._nodes), default=0)
        run = RunConfig.model_validate(config)
        key = run.model_dump_json(exclude={"output": True, "train": {"seed", "learning_rate"}})
        if key not in self._planned:
            found = None
            with suppress(SiliangError):
                target = find_target(run, "cuda" if "num_gpus" in self._resources else "cpu")
                found = plan(run, target, subject=look_at(run, machine()), timed=False).methods[0]
            if found is None or found.error:
                self._planned[key] = 0
            else:
                self._planned[key] = found.host_bytes or found.needed_bytes
        return min(self._planned[key], most)


@dataclass(eq=False)
class _Going:
    """A request, and what has become of it.

    Attributes:
        node: The machine that does it; empty before it is begun.
        avoid: Machines that lost it.
        begun: Its folder, where it goes on on a machine without ours.
        incomplete: Of its folder, not all bytes came back.
        most_bytes: More than its folder may have.
    """

    number: int
    request: dict[str, Any]
    node: str = ""
    node_id: str = ""
    avoid: tuple[str, ...] = ()
    begun: Crate | None = None
    incomplete: bool = False
    most_bytes: int = 0
    _incoming: Incoming | None = field(default=None, repr=False)

    @property
    def folder(self) -> Path:
        return Path(self.request["config"]["output"])

    def again(self) -> _Going:
        """The same for another machine: from the last checkpoint, if it has come here, or from the start."""
        if self._incoming is not None:
            self._incoming.discard()
        request = dict(self.request)
        if "resume" in request:
            request["resume"] = goes_on(RunConfig.model_validate(request["config"]))
        return _Going(self.number, request, avoid=(*self.avoid, self.node_id) if self.node_id else self.avoid)

    def receive(self, message: dict[str, Any]) -> None:
        """A piece of the run's folder; it stands under its name when it is whole.

        Raises:
            ClusterError: It is no piece of a run's folder.
        """
        if self._incoming is None:
            self._incoming = Incoming(self.folder, self.most_bytes, self.node or "a machine")
        if message["kind"] == "file":
            self._incoming.write(message["name"], message["bytes"])
        elif message["kind"] == "folder":
            self.incomplete = not self._incoming.finish(message["nbytes"])


def _take_token() -> None:
    """Has Ray show the token that this user has. It does so by itself for the address `auto` alone."""
    named = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if named or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # to a cluster without tokens it makes no difference


def _is_joined() -> bool:
    """Whether this process has a Ray already, which is then taken and left as it is."""
    import ray

    return ray.is_initialized()


def _begin(address: str, jobs: int, threads: int) -> None:
    """A Ray of our own, or a place in the cluster; without telemetry, and without a word that is not ours."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # it warns that this will become the default
    import ray
    import torch

    settings: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        settings |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
        if not torch.cuda.is_available():
            settings |= {"num_cpus": jobs * threads, "num_gpus": 0}
    try:
        ray.init(**settings)
    except Exception as error:  # Ray raises kinds of its own for each thing that it lacks
        where = "begun here" if address == LOCAL else f"used at {address}"
        raise ClusterError(f"Ray cannot be {where}: {first_line(error, kind=True)}") from error


def _probe(address: str) -> None:
    """Joins the cluster in a process that may hang or fall over in place of this one.

    Raises:
        ClusterError: It cannot be joined.
    """
    if "://" in address:
        raise ClusterError(
            f"--ray {address}: siliang does not work through a Ray client. Give HOST:PORT of the cluster's head, on a "
            "machine that `ray start --address HOST:PORT` has made part of it."
        )
    code = (
        "import logging, sys, ray\n"
        "try: ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.CRITICAL)\n"
        "except Exception as error: print(*str(error).strip().splitlines()[:1]); sys.exit(1)"
    )
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal():  # Ray itself would knock for a minute
            socket.create_connection((host, int(port)), KNOCK_S).close()
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, address],
            capture_output=True,
            text=True,
            timeout=PROBE_S,
            env=environment,
        )
        why = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else f"it ended with code {done.returncode}"
        if done.returncode == 0:
            return
        if "InvalidAuthToken" in done.stderr:
            why = "it asks for its token: copy ~/.ray/auth_token from the cluster's head to this machine."
    except subprocess.TimeoutExpired:
        why = f"what is there has not answered as Ray does within {PROBE_S:.0f} s."
    except OSError as error:
        why = f"{error.strerror or error}."
    raise ClusterError(
        f"--ray {address}: no Ray cluster can be joined there: {why}\n"
        "Look at `ray status` on this machine; `--ray` alone begins a Ray here."
    )


def _why_lost(error: BaseException) -> str:
    from ray.exceptions import NodeDiedError, OutOfMemoryError

    if isinstance(error, OutOfMemoryError):
        return "Ray ended its process because the machine's memory was full"
    if isinstance(error, NodeDiedError):
        return "its machine left the cluster"
    return "its process was killed"


def _threads_in_words(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def _in_words(resources: dict[str, float]) -> str:
    cpus, cards = int(resources["num_cpus"]), int(resources.get("num_gpus", 0))
    parts = [f"{cpus} processor{'s' if cpus > 1 else ''}"] if cpus else []
    return " and ".join([*parts, *(["1 card"] if cards else [])])
