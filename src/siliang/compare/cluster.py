"""The workers of a Ray cluster: what `Pool` is for the processes of this machine. Each worker is a Ray actor."""

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
from siliang.compare.pool import STOP_S, Event, distribute, stop_all, threads_each
from siliang.compare.received import IncomingFolder, Message, checked
from siliang.compare.resume import can_resume
from siliang.compare.trials import MAX_ATTEMPTS
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
EXTRA_BYTES = 2**30  # limit for the files of a run's folder without the weights
UNKNOWN_BYTES = 2**40  # limit for a run's folder if the size of the base model is not known
PASSED_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", ALLOWED_CODE)  # to the workers


class Cluster:
    """Executes requests on the machines of a Ray cluster; a context manager.

    Args:
        address: The address of the cluster, or `local`.
        jobs: Runs at the same time on each machine. On the CPU, each run gets as many threads as a run of `Pool` with
            this number of jobs, so that the results are equal.
        logs: The folder for the output of the workers' libraries.
        say: Called with each line for the user.

    Attributes:
        marker: A file in the comparison's folder. A machine on which it exists shares the disk with this one.
        machines: The number of machines at the start.

    Raises:
        ClusterError: No cluster responds at the address.
    """

    def __init__(self, address: str, jobs: int, logs: Path, say: Callable[[str], None] = print) -> None:
        self.logs = logs.absolute()
        self.marker = self.logs.parent / f".shared-{uuid.uuid4().hex}"
        self.machines = 1
        self.resources: dict[str, float] = {}
        self.workers: list[RemoteWorker] = []
        self._address, self._jobs, self._say = join.check_address(address), jobs, say
        self._threads = threads_each(jobs)
        self._lock = threading.Lock()
        self._packed: dict[tuple[str, ...], Packed] = {}
        self._shown: set[str] = set()

    def __enter__(self) -> Self:
        self._ours = join.connect(self._address, self._jobs * self._threads)
        self.logs.mkdir(exist_ok=True)  # machines that share the disk write their logs there
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
        """Executes all requests, as resources become free, and yields the events as they happen.

        A request whose process or machine is lost is repeated, on another machine if one is free; the event is `lost`.
        """
        self.resources["memory"] = self._memory([RunConfig.model_validate(r["config"]) for r in requests])
        self.workers = [RemoteWorker(self) for _ in requests[: self._slots()]]
        for event in distribute(requests, self.workers):
            if event.kind != "note":
                yield event
            elif (line := event.message["line"]) not in self._shown:
                self._shown.add(line)
                self._say(line)

    def inputs(self, config: RunConfig) -> dict[str, list[Path]]:
        """The files that a run reads, by the names in its settings."""
        names: list[str] = []
        config.with_files(lambda name: names.append(name) or name, config.output)
        return {name: files for name in names if (files := files_of(name))}

    def packed(self, inputs: dict[str, list[Path]]) -> Packed:
        """The files in the object store. Each set of files is stored once."""
        with self._lock:
            key = tuple(inputs)
            if key not in self._packed:
                self._packed[key] = pack(list(chain(*inputs.values())), ray.put)
            return self._packed[key]

    def resources_text(self) -> Bilingual:
        """The resources that a run needs, as text."""
        cpus, memory = int(self.resources["num_cpus"]), int(self.resources.get("memory", 0))
        parts: list[tuple[str, str]] = []
        if cpus:
            parts.append((f"{cpus} CPU{'s' * (cpus > 1)}", f"{cpus} 个 CPU"))
        if "num_gpus" in self.resources:
            parts.append(("1 GPU", "1 张显卡"))
        if memory:
            parts.append((f"{show_bytes(memory)} of memory", f"{show_bytes(memory)} 内存"))
        return Bilingual(" and ".join(en for en, _ in parts), "、".join(zh for _, zh in parts))

    def _choose_resources(self) -> None:
        """Decides what each run reserves: a GPU if the cluster has any, otherwise a share of a machine's CPUs."""
        nodes = [node["Resources"] for node in _nodes()]
        self.machines = len(nodes)
        where = Bilingual("Ray on this machine", "本机的 Ray")
        if self.machines > 1:
            where = Bilingual(f"Ray on {self.machines} machines", f"{self.machines} 台机器的 Ray")
        if with_gpus := [node for node in nodes if node.get("GPU", 0) >= 1]:
            each = min(int(node.get("CPU", 0) // node["GPU"]) for node in with_gpus)
            self.resources = {"num_cpus": min(self._threads, each), "num_gpus": 1}
            runs = self._slots()
            self._say(
                both(
                    f"cluster    {where}: {runs} runs at a time, with 1 GPU each",
                    f"集群       {where.zh}：同时 {runs} 次运行，每次 1 张显卡",
                )
            )
            return
        cpus = min(self._threads, max(int(node.get("CPU", 0)) for node in nodes))
        if cpus == 0:
            raise ClusterError(
                Bilingual(
                    "The cluster has no CPUs: start its machines without --num-cpus=0.",
                    "集群没有可用的 CPU：启动各机器时不要加 --num-cpus=0。",
                )
            )
        self.resources = {"num_cpus": cpus}
        runs = self._slots()
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
                    f"warning    no machine has {self._threads} CPUs: the last digits of results may differ",
                    f"警告       没有一台机器有 {self._threads} 个 CPU：结果的末位数字可能不同",
                )
            )

    def _memory(self, runs: list[RunConfig]) -> int:
        """The main memory in bytes that each worker reserves: the largest need of a run by the plan, limited to the
        memory of the largest machine. 0 if no plan can be made."""
        each = {run.model_dump_json(exclude={"output": True, "train": {"seed", "learning_rate"}}): run for run in runs}
        wanted = 0
        for run in each.values():
            with suppress(SiliangError):
                target = target_device(run, "cuda" if "num_gpus" in self.resources else "cpu")
                found = plan(run, target, timed=False).methods[0]
                wanted = max(wanted, 0 if found.error else found.host_bytes or found.needed_bytes)
        return min(wanted, max(int(node["Resources"].get("memory", 0)) for node in _nodes()))

    def _slots(self) -> int:
        """The number of runs that an idle cluster can execute at the same time; at least 1, which may have to wait."""
        names = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        needed = {ray_name: self.resources.get(name, 0) for ray_name, name in names.items()}
        each = (min(int(node["Resources"].get(k, 0) // n) for k, n in needed.items() if n) for node in _nodes())
        return max(1, sum(each))


class RemoteWorker:
    """Executes requests as `Worker` does, in a Ray actor on a machine with free resources."""

    def __init__(self, cluster: Cluster) -> None:
        self.node = ""  # the name of the machine, after the actor has started
        self._cluster = cluster
        self._host: Any = None
        self._description: Message = {}  # of the machine, from the actor
        self._avoided: set[str] = set()  # machines that lost a run
        self._closed = False
        self._idle = threading.Event()
        self._idle.set()

    def run(self, request: Message) -> Iterator[Message]:
        """Executes a request and yields its messages, up to done, failed or died. A stopped worker yields nothing."""
        self._idle.clear()
        try:
            for attempt in range(1, MAX_ATTEMPTS + 1):
                why = None if self._closed else (yield from self._attempt(request))
                if why is None or self._closed:
                    return
                if self.node:
                    self._avoided.add(self._description["node_id"])
                self.release()
                if attempt < MAX_ATTEMPTS:
                    yield {"kind": "lost", "error": why}
                    if "resume" in request:
                        request = request | {"resume": can_resume(RunConfig.model_validate(request["config"]))}
                else:
                    tries = Bilingual(
                        f"started {attempt} times, and lost its process each time; the last time: ",
                        f"启动了 {attempt} 次，每次进程都中断；最后一次：",
                    )
                    yield {"kind": "died", "error": together(tries, why)}
        finally:
            self._idle.set()

    def stop(self) -> None:
        """Stops the current run after it has saved a checkpoint. The checkpoint is copied to this machine."""
        self._closed = True
        if self.node:
            self._host.stop.remote()
        else:  # it waits for resources
            self.release()

    def wait(self) -> None:
        """Waits until the files of the current run have arrived, with a timeout."""
        self._idle.wait(2 * STOP_S)

    def release(self) -> None:
        """Ends the actor and frees its resources. The next request starts a new actor."""
        host, self._host, self.node = self._host, None, ""
        if host is not None:
            ray.kill(host)

    close = release

    def _attempt(self, request: Message) -> Generator[Message, None, str | None]:
        """Executes a request once. Returns why its process was lost; None if the request has ended."""
        config = RunConfig.model_validate(request["config"])
        output = Path(config.output)
        if output.parent.is_dir():
            remove_stale(output.parent, re.escape(output.name))  # left by a killed comparison
        inputs, incoming = self._cluster.inputs(config), None
        try:
            if (problem := (yield from self._start())) is not None:
                self.release()
                yield {"kind": "failed", "error": problem}
                return None
            incoming = IncomingFolder(output, _max_bytes(config, inputs.get(config.model)), self.node)
            arguments = yield from self._arguments(request, config, inputs)
            for reference in self._host.run.options(num_returns="streaming").remote(*arguments):
                message = checked(ray.get(reference))
                if message["kind"] in ("file", "folder"):
                    incoming.receive(message)
                elif message["kind"] == "died":
                    return f"{message['error']} on {self.node}"
                elif message["kind"] == "done" and incoming.incomplete:
                    return Bilingual(
                        f"its files did not arrive completely from {self.node}", f"它的文件没有从 {self.node} 完整传回"
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
                return self._lost_reason(error)
            yield {"kind": "failed", "error": str(error).strip().splitlines()[-1]}
        finally:
            if incoming is not None:
                incoming.discard()
        return None

    def _start(self) -> Generator[Message, None, str | None]:
        """Starts an actor, unless one is running. Returns what is wrong with its machine, or None."""
        if self._host is not None:
            return None
        cluster = self._cluster
        passed = {name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ}
        threads = {"OMP_NUM_THREADS": str(max(1, int(cluster.resources["num_cpus"])))}
        # two calls at a time: `stop` must be able to interrupt `run`
        options: Message = cluster.resources | {"max_concurrency": 2, "runtime_env": {"env_vars": passed | threads}}
        if self._avoided:
            other_nodes: Any = {"ray.io/node-id": NotIn(*self._avoided)}
            options["scheduling_strategy"] = NodeLabelSchedulingStrategy(hard={}, soft=other_nodes)
        self._host = ray.remote(Host).options(**options).remote(str(cluster.logs))
        described = self._host.describe.remote()
        ready, _ = ray.wait([described], timeout=SAY_WAITING_S)
        if not ready and not any(worker.node for worker in cluster.workers):
            needs = cluster.resources_text()
            yield {
                "kind": "note",
                "line": both(
                    f"waiting    for free resources in the cluster: a run needs {needs}",
                    f"等待       集群腾出资源：一次运行需要 {needs.zh}",
                ),
            }
        self._description = checked(ray.get(described))
        if self._description["kind"] != "ready":
            return str(self._description["error"])
        self.node = self._description["node"]
        for name in VERSIONS:
            if (there := self._description["versions"].get(name)) == (here := version(name)):
                continue
            if name == "siliang":
                return Bilingual(
                    f"{self.node} has siliang {there}, not {here}: install the same version on it",
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
        """The arguments of the actor's `run`. On a machine that does not share the disk, the run works on copies."""
        cluster = self._cluster
        states = {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in chain(*inputs.values())}
        if ray.get(self._host.shares_disk.remote(str(cluster.marker), states)):
            return request, None, None
        for name, files in inputs.items():
            size = show_bytes(sum(path.stat().st_size for path in files))
            yield {
                "kind": "note",
                "line": both(
                    f"files      sending {name} to the machines that do not have it ({size})",
                    f"文件       把 {name} 发送到没有它的机器（{size}）",
                ),
            }
        packed, cache = cluster.packed(inputs), self._description["cache"]
        output = f"{cache}/{RUN}-{uuid.uuid4().hex}{config.output}"
        there = config.with_files(lambda name: f"{cache}/{packed.folder}{name}" if name in inputs else name, output)
        started = pack(list(walk(Path(config.output))), ray.put) if request.get("resume") else None
        return request | {"config": there.model_dump(mode="json")}, packed, started

    def _lost_reason(self, error: RayError) -> str:
        if not self.node:
            return Bilingual("it could not be started", "无法启动")
        why = Bilingual("its process was killed", "进程被杀死")
        if isinstance(error, OutOfMemoryError):
            why = Bilingual(
                "Ray killed its process because the machine's memory was full", "机器内存已满，Ray 结束了进程"
            )
        elif self._description["node_id"] not in {node["NodeID"] for node in _nodes()}:
            return Bilingual(f"its machine {self.node} left the cluster", f"机器 {self.node} 离开了集群")
        return Bilingual(f"{why} on {self.node}", f"{why.zh}（{self.node}）")


def _nodes() -> list[dict[str, Any]]:
    """The machines that are in the cluster now."""
    return [node for node in ray.nodes() if node["Alive"]]


def _max_bytes(config: RunConfig, model: list[Path] | None) -> int:
    """An upper limit of the size of a run's folder: the weights in fp32, at the end and in each checkpoint, there with
    the two moments of Adam."""
    if model is None:
        return UNKNOWN_BYTES
    weights = 4 * sum(path.stat().st_size for path in model)  # the files may hold 8-bit weights
    return EXTRA_BYTES + weights * (1 + 3 * (config.train.keep + 2))
