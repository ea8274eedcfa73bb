"""Several ranks on this machine: forked, so that what is imported already need not be imported again."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState

from faults.runs import Child, Ending
from siliang.config import RunConfig
from siliang.train.run import Planner


def _become(rank: int, size: int, port: int) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    for state in (AcceleratorState, PartialState, GradientState):  # the parent may have trained alone
        state._reset_state()


def start(
    config: RunConfig,
    size: int,
    *,
    resume: bool = False,
    pace_s: float = 0.0,
    planner: Planner | None = None,
    before: Callable[[], None] = lambda: None,
) -> list[Child]:
    """A training on `size` ranks; `before` is called in each."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]

    def become(rank: int) -> None:
        _become(rank, size, port)
        before()

    return [
        Child(config, resume=resume, hook=partial(become, rank), pace_s=pace_s, planner=planner) for rank in range(size)
    ]


def train_on(config: RunConfig, size: int, *, resume: bool = False) -> list[Ending]:
    """A training on `size` ranks, to its end."""
    return [child.end() for child in start(config, size, resume=resume)]


def changed(config: RunConfig, folder: Path, strategy: str = "ddp") -> RunConfig:
    """The same training, otherwise dealt with."""
    distributed = config.distributed.model_copy(update={"strategy": strategy})
    return config.model_copy(update={"output": str(folder), "distributed": distributed})
