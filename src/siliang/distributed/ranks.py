"""The processes of one training, started by torchrun or accelerate, and what they exchange other than gradients."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from siliang.distributed.launched import accelerate_strategy
from siliang.language import Bilingual, local
from siliang.types import RankError, SiliangError, first_line

T = TypeVar("T")
CONNECTION_LOST = re.compile(
    r"connection (closed|reset)|closed by peer|broken pipe|remote process|socket|timed? ?out", re.I
)


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those of its training.

    The collective calls below run on the CPU (gloo), so that no device waits for them. Every rank must make each of
    them, in the same order.

    Attributes:
        rank: Of `size`, over all machines.
        local_rank: Of `local_size`, on this machine.
        accelerate_settings: The strategy of an accelerate config, as settings of `distributed`; {} without one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    accelerate_settings: Mapping[str, object] = field(default_factory=dict[str, object])

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The value of each rank, in order."""
        if self.size == 1:
            return [value]
        found = [value] * self.size
        dist.all_gather_object(found, value, group=_cpu_group())
        return found

    def gather_ints(self, *values: int) -> list[list[int]]:
        """The integers of each rank, in order; faster than `gather`."""
        if self.size == 1:
            return [list(values)]
        found = [torch.empty(len(values), dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(found, torch.tensor(values, dtype=torch.int64), group=_cpu_group())
        return [each.tolist() for each in found]

    def from_main(self, work: Callable[[], T]) -> T:
        """Runs `work` on rank 0 alone, and returns its result, or raises its SiliangError, on every rank."""
        if self.size == 1:
            return work()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = work()
            except SiliangError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=_cpu_group())
        if box[1] is not None:
            raise box[1]
        return box[0]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others do, which then find what it left in a cache. An error of the block is
        raised by each rank for itself."""
        if not self.is_main:
            self.wait()
        try:
            yield
        finally:
            if self.is_main:
                self.wait()

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """The ranks of a machine run the block one after another, also where it raises in one of them."""
        turns = max(self.gather(self.local_size))
        for _ in range(self.local_rank):
            self.wait()
        try:
            yield
        finally:
            for _ in range(self.local_rank, turns):
                self.wait()

    def wait(self) -> None:
        """A barrier: returns when every rank has called it."""
        if self.size > 1:
            dist.barrier(group=_cpu_group())


def find_ranks() -> Ranks:
    """Joins the other processes of this training, if there are any.

    torchrun and `accelerate launch` describe them in the environment. Each process then has its device and the default
    process group.
    """
    return _alone() if int(os.environ.get("WORLD_SIZE", "1")) == 1 else _join()


@cache
def _alone() -> Ranks:
    accelerate_strategy()  # taken out of the environment: one process shards nothing
    return Ranks()


@cache
def _join() -> Ranks:
    from accelerate import PartialState

    settings = accelerate_strategy()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, torch.get_num_threads() // local_size)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # accelerate would warn, and choose by itself
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, store=_own_store(rank, size), rank=rank, world_size=size)
        except RuntimeError as error:
            raise RankError(
                Bilingual(
                    f"Rank {rank} of {size} has not met the others ({_reason(error)}).",
                    f"第 {rank} 号进程（共 {size} 个）没有与其他进程会合（{_reason(error)}）。",
                )
            ) from error
    state = PartialState(cpu=not torch.cuda.is_available())
    return Ranks(state.process_index, state.num_processes, state.local_process_index, local_size, settings)


def _own_store(rank: int, size: int) -> Store:
    """A part of torchrun's store that belongs to this start alone.

    The store survives a restart, and then holds the addresses of dead processes; the count of restarts differs between
    nodes (pytorch issue 135712). So every process draws a name of its own, and rank 0's name is the prefix of this
    start. Rank 0 lists the names that it has met: a process that is not among them has read the prefix of an earlier
    start, and reads again.
    """
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("siliang/first", own)
        met = [store.get(f"siliang/{own}/{other}").decode() for other in range(1, size)]
        store.set(f"siliang/{own}/met", " ".join(met))
        return PrefixStore(f"siliang/{own}", store)
    announced = ""
    while True:
        first = store.get("siliang/first").decode()
        if first != announced:
            store.set(f"siliang/{first}/{rank}", own)
            announced = first
        met_key = f"siliang/{first}/met"
        if store.check([met_key]) and own in store.get(met_key).decode():
            return PrefixStore(f"siliang/{first}", store)
        time.sleep(0.05)


@cache
def _cpu_group() -> dist.ProcessGroup | None:
    """The group of all ranks on the CPU, made at the first collective call. NCCL's would make the devices wait."""
    if dist.get_backend() == "gloo":
        return dist.group.WORLD
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


@contextmanager
def translate_rank_errors(advice: str) -> Iterator[None]:
    """Within the block an error of the network becomes a RankError.

    Args:
        advice: What was saved, and how to resume.

    Raises:
        RankError: Another process of this training is gone.
    """
    try:
        yield
    except RuntimeError as error:
        known = isinstance(error, SiliangError)
        lost = isinstance(error, dist.DistError) or CONNECTION_LOST.search(str(error))
        if known or not dist.is_initialized() or not lost:
            raise
        rank, size = dist.get_rank(), dist.get_world_size()
        raise RankError(
            Bilingual(
                f"Rank {rank} of {size} has lost another rank, which was killed or cannot be reached "
                f"({_reason(error)}).\n{advice}",
                f"第 {rank} 号进程（共 {size} 个）与另一个进程失去联系，它被杀死或网络不可达"
                f"（{_reason(error)}）。\n{local(advice, 'zh')}",
            )
        ) from error


def _reason(error: BaseException) -> str:
    """What happened, without torch's source location and advice."""
    first = first_line(error).partition(". This ")[0]
    return re.sub(r"^\[\S+\] ", "", first)[-120:]
