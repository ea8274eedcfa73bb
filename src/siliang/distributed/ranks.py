"""The processes of one training, as torchrun or accelerate started them, and the few words they exchange beside
gradients."""

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

from siliang.distributed.launched import asked_of_accelerate
from siliang.types import RankError, SiliangError, first_line

T = TypeVar("T")
GONE = re.compile(r"connection (closed|reset)|closed by peer|broken pipe|remote process|socket|timed? ?out", re.I)


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those of its training.

    Attributes:
        rank: Of `size`, over all machines.
        local_rank: Of `local_size`, on this machine.
        asked: What an accelerate config says of how they share the model, as `distributed` has it.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    asked: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def first(self) -> bool:
        """Whether this one speaks and writes for all."""
        return self.rank == 0

    def all(self, value: T) -> list[T]:
        """What each rank says, in order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=_words())
        return found

    def numbers(self, *values: int) -> list[list[int]]:
        """The same for a few whole numbers, which is quicker: one list a rank. No device waits for it."""
        if self.size == 1:
            return [list(values)]
        found = [torch.empty(len(values), dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(found, torch.tensor(values, dtype=torch.int64), group=_words())
        return [each.tolist() for each in found]

    def first_does(self, work: Callable[[], T]) -> T:
        """What the first rank's `work` returns, on every rank; its error, too."""
        if self.size == 1:
            return work()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = work()
            except SiliangError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=_words())
        if box[1] is not None:
            raise box[1]
        return box[0]  # type: ignore[no-any-return]

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first rank goes through the block before the others do: what it leaves in a cache is there for them. They
        come to its errors by themselves."""
        if not self.first:
            self.wait()
        try:
            yield
        finally:
            if self.first:
                self.wait()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The ranks of a machine go through the block one after the other, whatever becomes of it."""
        turns = max(self.all(self.local_size))
        for _ in range(self.local_rank):
            self.wait()
        try:
            yield
        finally:
            for _ in range(self.local_rank, turns):
                self.wait()

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier(group=_words())


def find_ranks() -> Ranks:
    """Joins the other processes of this training, if there are any.

    The environment of torchrun and of `accelerate launch` tells; each process then has its device, and a group.
    """
    return _alone() if int(os.environ.get("WORLD_SIZE", "1")) == 1 else _join()


@cache
def _alone() -> Ranks:
    asked_of_accelerate()  # one process shares nothing
    return Ranks()


@cache
def _join() -> Ranks:
    from accelerate import PartialState

    asked = asked_of_accelerate()
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
            raise RankError(f"Rank {rank} of {size} has not met the others ({_first_words(error)}).") from error
    state = PartialState(cpu=not torch.cuda.is_available())
    return Ranks(state.process_index, state.num_processes, state.local_process_index, local_size, asked)


def _own_store(rank: int, size: int) -> Store:
    """A part of torchrun's store that the processes of this start have to themselves.

    The store outlives a restart with the addresses of dead processes in it, and the counts of restarts differ between
    nodes (pytorch issue 135712): so every process has a name of its own, the first one's is the prefix, and who is not
    among those that the first has met read the name of an earlier start.
    """
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("siliang/first", own)
        met = [store.get(f"siliang/{own}/{other}").decode() for other in range(1, size)]
        store.set(f"siliang/{own}/met", " ".join(met))
        return PrefixStore(f"siliang/{own}", store)
    said = ""
    while True:
        first = store.get("siliang/first").decode()
        if first != said:
            store.set(f"siliang/{first}/{rank}", own)
            said = first
        met_key = f"siliang/{first}/met"
        if store.check([met_key]) and own in store.get(met_key).decode():
            return PrefixStore(f"siliang/{first}", store)
        time.sleep(0.05)


@cache
def _words() -> Any:
    """A group on the CPU, made by all ranks at their first word: NCCL's would make the devices wait."""
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


@contextmanager
def telling_of_the_dead(where: str) -> Iterator[None]:
    """Within the block the network's errors become one that says what happened.

    Args:
        where: What was saved, and how to go on.

    Raises:
        RankError: Another process of this training is gone.
    """
    try:
        yield
    except RuntimeError as error:
        known = isinstance(error, SiliangError)
        if known or not dist.is_initialized() or not (isinstance(error, dist.DistError) or GONE.search(str(error))):
            raise
        raise RankError(
            f"Rank {dist.get_rank()} of {dist.get_world_size()} has lost another rank, which was killed or cannot be "
            f"reached ({_first_words(error)}).\n{where}"
        ) from error


def _first_words(error: BaseException) -> str:
    """What happened, without where in torch's code and without its advice."""
    first = first_line(error).partition(". This ")[0]
    return re.sub(r"^\[\S+\] ", "", first)[-120:]
