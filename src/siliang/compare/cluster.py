"""The machines of a Ray cluster, used as `Pool` uses the processes of this machine: each worker is a Ray actor."""

from __future__ import annotations

import os
import re
import threading
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from siliang.compare.packed import RUN, Packed, files_of, pack, walk
from siliang.compare.pool import STOP_S, Event, share, stop_all, threads_each
from siliang.compare.received import Incoming, Message, checked
from siliang.compare.resume import can_resume
from siliang.compare.trials import MOST_ATTEMPTS
from siliang.config import RunConfig
from siliang.environment import prepare_ray
from siliang.files import remove_stale
from siliang.language import Bilingual, both, together
from siliang.plan import plan
from siliang.plan.device import target_device
from siliang.safety.permissions import VARIABLE as ALLOWED_CODE
from siliang.types import ClusterError, SiliangError, first_line
from siliang.units import show_bytes

prepare_ray()  # Ray reads its settings when it is imported
import ray  # noqa: E402
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, RuntimeEnvSetupError  # noqa: E402
from ray.util.scheduling_strategies import NodeLabelSchedulingStrategy, NotIn  # noqa: E402

from siliang.compare import join  # noqa: E402
from siliang.compare.host import VERSIONS, Host, version  # noqa: E402

SAY_WAITING_S = 15.0
EXTRA_BYTES = 2**30  # for the files of a run's folder other than weights
UNKNOWN_BYTES = 2**40  # limit of a run's folder if the base model's size is not known here
CARRIED = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", ALLOWED_CODE)  # passed to the workers, if set


class Cluster:
    """Has requests done on the machines of a Ray cluster; for the life of a `with` block.

    Args:
        address: Of the cluster, or `local`.
        jobs: Runs at the same time on each machine. On the CPU each has its share of as many threads as this machine
            has, so that results are those of `Pool` with as many jobs.
        logs: Folder for what the workers' libraries print.
        say: Called with each line for the user.

    Attributes:
        marker: A file in the comparison's folder. A machine that sees it shares that disk with this one.
        machines: How many the cluster had at the start.

    Raises:
        ClusterError: No cluster answers at that address.
    """

    def __init__(self, address: str, jobs: int, logs: Path, say: Callable[[str], None] = print) -> None:
        self.logs = logs.absolute()
        self.marker = self.logs.parent / f".shared-{uuid.uuid4().hex}"
        self.machines = 1
        self.resources: dict[str, float] = {}
        self.workers: list[RemoteWorker] = []
        self._address, self._jobs, self._say = join.check(address), jobs, say
        self._threads = threads_each(jobs)
        self._lock = threading.Lock()
        self._packed: dict[tuple[str, ...], Packed] = {}
        self._shown: set[str] = set()

    def __enter__(self) -> Self:
        self._ours = join.start(self._address, self._jobs * self._threads)
        self.logs.mkdir(exist_ok=True)  # a machine that sees it writes there
        self.marker.touch()
        self._choose_resources()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            stop_all(self.workers)
        finally:
            self.marker.unlink(missing_ok=True)
            if self._ours:
                ray.shutdown()

    def run(self, requests: list[Message]) -> Iterator[Event]:
        """Has all requests done, wherever there is room, and yields what happens as it happens.

        A request whose process or machine is lost is done again, on another machine where one has room: `lost`.
        """
        self.resources["memory"] = self._memory([RunConfig.model_validate(r["config"]) for r in requests])
        self.workers = [RemoteWorker(self) for _ in requests[: self._places()]]
        for event in share(requests, self.workers):
            if event.kind != "note":
                yield event
            elif (line := event.message["line"]) not in self._shown:
                self._shown.add(line)
                self._say(line)

    def inputs(self, config: RunConfig) -> dict[str, list[Path]]:
        """The files that a run reads, by the names that its settings give them."""
        names: list[str] = []
        config.with_files(lambda name: names.append(name) or name, config.output)
        return {name: files for name in names if (files := files_of(name))}

    def packed(self, inputs: dict[str, list[Path]]) -> Packed:
        """The files in the object store, where they are put once."""
        with self._lock:
            key = tuple(inputs)
            if key not in self._packed:
                self._packed[key] = pack(list(chain(*inputs.values())), ray.put)
            return self._packed[key]

    def takes(self) -> str:
        """The resources that a run needs, in words."""
        cpus = int(self.resources["num_cpus"])
        parts = [f"{cpus} processor{'s' * (cpus > 1)}"] if cpus else []
        parts += ["1 card"] * ("num_gpus" in self.resources)
        memory = int(self.resources.get("memory", 0))
        return " and ".join(parts + [f"{show_bytes(memory)} of memory"] * (memory > 0))

    def _choose_resources(self) -> None:
        """A run gets a card if the cluster has any, otherwise its share of a machine's processors."""
        nodes = [node["Resources"] for node in _nodes()]
        self.machines = len(nodes)
        where = Bilingual("Ray on this machine", "本机的 Ray")
        if self.machines > 1:
            where = Bilingual(f"Ray on {self.machines} machines", f"{self.machines} 台机器的 Ray")
        if with_cards := [node for node in nodes if node.get("GPU", 0) >= 1]:
            each = min(int(node.get("CPU", 0) // node["GPU"]) for node in with_cards)
            self.resources = {"num_cpus": min(self._threads, each), "num_gpus": 1}
            runs = self._places()
            self._say(
                both(
                    f"cluster    {where}: {runs} runs at a time, each with its card",
                    f"集群       {where.zh}：同时 {runs} 次运行，每次一张显卡",
                )
            )
            return
        cpus = min(self._threads, max(int(node.get("CPU", 0)) for node in nodes))
        if cpus == 0:
            raise ClusterError(
                Bilingual(
                    "The cluster offers no processors: start its machines without --num-cpus=0.",
                    "集群没有可用的处理器：启动各机器时不要加 --num-cpus=0。",
                )
            )
        self.resources = {"num_cpus": cpus}
        runs = self._places()
        self._say(
            both(
                f"cluster    {where}: {runs} run{'s' * (runs > 1)} at a time, "
                f"with {cpus} thread{'s' * (cpus > 1)} each",
                f"集群       {where.zh}：同时 {runs} 次运行，每次 {cpus} 个线程",
            )
        )
        if cpus < self._threads:
            self._say(
                both(
                    f"warning    no machine has {self._threads} processors as this one: last digits may differ",
                    f"警告       没有一台机器像本机这样有 {self._threads} 个处理器：结果的末位数字可能不同",
                )
            )

    def _memory(self, runs: list[RunConfig]) -> int:
        """The main memory in bytes that each worker reserves: by the plan, that of the run which takes the most. No
        more than a machine has, where the run itself reports that it does not fit; 0 where no plan can be made."""
        each = {run.model_dump_json(exclude={"output": True, "train": {"seed", "learning_rate"}}): run for run in runs}
        wanted = 0
        for run in each.values():
            with suppress(SiliangError):
                target = target_device(run, "cuda" if "num_gpus" in self.resources else "cpu")
                found = plan(run, target, timed=False).methods[0]
                wanted = max(wanted, 0 if found.error else found.host_bytes or found.needed_bytes)
        return min(wanted, max(int(node["Resources"].get("memory", 0)) for node in _nodes()))

    def _places(self) -> int:
        """How many runs the cluster has room for at a time, if it does nothing else; at least one, which may wait."""
        names = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        wanted = {there: self.resources.get(name, 0) for there, name in names.items()}
        each = (min(int(node["Resources"].get(k, 0) // n) for k, n in wanted.items() if n) for node in _nodes())
        return max(1, sum(each))


class RemoteWorker:
    """Does requests as `Worker` does, in a Ray actor on a machine that has room."""

    def __init__(self, cluster: Cluster) -> None:
        self.node = ""  # the machine's name, once the actor has started
        self._cluster = cluster
        self._host: Any = None
        self._about: Message = {}  # the actor's description of its machine
        self._avoided: set[str] = set()  # machines that lost a run
        self._closed = False
        self._idle = threading.Event()
        self._idle.set()

    def ask(self, request: Message) -> Iterator[Message]:
        """Has a request done and yields its messages, up to done, failed or died; nothing once it is stopped."""
        self._idle.clear()
        try:
            for attempt in range(1, MOST_ATTEMPTS + 1):
                why = None if self._closed else (yield from self._attempt(request))
                if why is None or self._closed:
                    return
                if self.node:
                    self._avoided.add(self._about["node_id"])
                self.rest()
                if attempt < MOST_ATTEMPTS:
                    yield {"kind": "lost", "error": why}
                    if "resume" in request:
                        request = request | {"resume": can_resume(RunConfig.model_validate(request["config"]))}
                else:
                    tries = Bilingual(
                        f"started {attempt} times, and each time its process was lost; the last time: ",
                        f"启动了 {attempt} 次，每次都失去了进程；最后一次：",
                    )
                    yield {"kind": "died", "error": together(tries, why)}
        finally:
            self._idle.set()

    def stop(self) -> None:
        """Has the run that is under way save a checkpoint, which comes here, and end."""
        self._closed = True
        if self.node:
            self._host.stop.remote()
        else:  # it waits for room
            self.rest()

    def wait(self) -> None:
        """Until the run that is under way has come here, or is late."""
        self._idle.wait(2 * STOP_S)

    def rest(self) -> None:
        """Gives the actor's place in the cluster back; the next request starts another."""
        host, self._host, self.node = self._host, None, ""
        if host is not None:
            ray.kill(host)

    close = rest

    def _attempt(self, request: Message) -> Generator[Message, None, str | None]:
        """Has a request done once; returns why its process was lost, or None where there was an end to it."""
        config = RunConfig.model_validate(request["config"])
        output = Path(config.output)
        if output.parent.is_dir():
            remove_stale(output.parent, re.escape(output.name))  # of a comparison that was killed
        inputs, incoming = self._cluster.inputs(config), None
        try:
            if (problem := (yield from self._start())) is not None:
                self.rest()
                yield {"kind": "failed", "error": problem}
                return None
            incoming = Incoming(output, _most_bytes(config, inputs.get(config.model)), self.node)
            arguments = yield from self._arguments(request, config, inputs)
            for reference in self._host.run.options(num_returns="streaming").remote(*arguments):
                message = checked(ray.get(reference))
                if message["kind"] in ("file", "folder"):
                    incoming.receive(message)
                elif message["kind"] == "died":
                    return f"{message['error']} on {self.node}"
                elif message["kind"] == "done" and incoming.incomplete:
                    return Bilingual(
                        f"its files did not come back whole from {self.node}", f"它的文件没有从 {self.node} 完整传回"
                    )
                else:
                    if message["kind"] == "progress" and self._cluster.machines > 1:
                        message["progress"]["node"] = self.node
                    yield message
        except RayTaskError as error:
            yield {"kind": "failed", "error": first_line(error.cause or error, kind=True)}
        except RayError as error:
            not_started = isinstance(error, RuntimeEnvSetupError) or getattr(error, "actor_init_failed", False)
            if not not_started:
                return self._why_lost(error)
            yield {"kind": "failed", "error": str(error).strip().splitlines()[-1]}
        finally:
            if incoming is not None:
                incoming.discard()
        return None

    def _start(self) -> Generator[Message, None, str | None]:
        """Starts an actor, unless there is one; returns what is wrong with its machine."""
        if self._host is not None:
            return None
        cluster = self._cluster
        carried = {name: os.environ[name] for name in CARRIED if name in os.environ}
        threads = {"OMP_NUM_THREADS": str(max(1, int(cluster.resources["num_cpus"])))}
        # two at a time: `stop` must arrive during `run`
        options: Message = cluster.resources | {"max_concurrency": 2, "runtime_env": {"env_vars": carried | threads}}
        if self._avoided:
            elsewhere: Any = {"ray.io/node-id": NotIn(*self._avoided)}
            options["scheduling_strategy"] = NodeLabelSchedulingStrategy(hard={}, soft=elsewhere)
        self._host = ray.remote(Host).options(**options).remote(str(cluster.logs))
        described = self._host.describe.remote()
        ready, _ = ray.wait([described], timeout=SAY_WAITING_S)
        if not ready and not any(worker.node for worker in cluster.workers):
            yield {
                "kind": "note",
                "line": both(
                    f"waiting    for room in the cluster: a run takes {cluster.takes()}",
                    f"等待       集群腾出资源：一次运行需要 {cluster.takes()}",
                ),
            }
        self._about = checked(ray.get(described))
        if self._about["kind"] != "ready":
            return str(self._about["error"])
        self.node = self._about["node"]
        for name in VERSIONS:
            if (there := self._about["versions"].get(name)) == (here := version(name)):
                continue
            if name == "siliang":
                return Bilingual(
                    f"{self.node} has siliang {there}, not {here}: install the same there",
                    f"{self.node} 上的 siliang 是 {there}，而不是 {here}：请在那里安装相同的版本",
                )
            line = both(
                f"warning    {self.node} has {name} {there}, this machine {here}: results may differ",
                f"警告       {self.node} 上的 {name} 是 {there}，本机是 {here}：结果可能不同",
            )
            yield {"kind": "note", "line": line}
        return None

    def _arguments(
        self, request: Message, config: RunConfig, inputs: dict[str, list[Path]]
    ) -> Generator[Message, None, tuple[Message, Packed | None, Packed | None]]:
        """The arguments of the actor's `run`. On a machine that does not see the user's files, the run reads and writes
        copies."""
        cluster = self._cluster
        states = {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in chain(*inputs.values())}
        if ray.get(self._host.sees.remote(str(cluster.marker), states)):
            return request, None, None
        for name, files in inputs.items():
            size = show_bytes(sum(path.stat().st_size for path in files))
            yield {
                "kind": "note",
                "line": both(
                    f"files      {name} goes to the machines that do not have it ({size})",
                    f"文件       把 {name} 发送到没有它的机器（{size}）",
                ),
            }
        packed, cache = cluster.packed(inputs), self._about["cache"]
        output = f"{cache}/{RUN}-{uuid.uuid4().hex}{config.output}"
        there = config.with_files(lambda name: f"{cache}/{packed.folder}{name}" if name in inputs else name, output)
        started = pack(list(walk(Path(config.output))), ray.put) if request.get("resume") else None
        return request | {"config": there.model_dump(mode="json")}, packed, started

    def _why_lost(self, error: RayError) -> str:
        if not self.node:
            return Bilingual("it could not be started", "无法启动")
        why = Bilingual("its process was killed", "它的进程被杀死")
        if isinstance(error, OutOfMemoryError):
            why = Bilingual(
                "Ray ended its process because the machine's memory was full", "机器内存已满，Ray 结束了它的进程"
            )
        elif self._about["node_id"] not in {node["NodeID"] for node in _nodes()}:
            why = Bilingual("its machine left the cluster", "它的机器离开了集群")
        return Bilingual(f"{why} on {self.node}", f"{why.zh}（{self.node}）")


def _nodes() -> list[dict[str, Any]]:
    """The machines that are part of the cluster now."""
    return [node for node in ray.nodes() if node["Alive"]]


def _most_bytes(config: RunConfig, model: list[Path] | None) -> int:
    """More than a run's folder can have: its weights in fp32, at its end and in each checkpoint, there with two moments
    of Adam's."""
    if model is None:
        return UNKNOWN_BYTES
    weights = 4 * sum(path.stat().st_size for path in model)  # of 8 bits
    return EXTRA_BYTES + weights * (1 + 3 * (config.train.keep + 2))
