"""What a checkpoint holds of the optimizer: whole tensors, the same with every strategy."""

from __future__ import annotations

from pathlib import Path

from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from siliang.distributed import deepspeed
from siliang.distributed.sharding import shard_optimizer_state
from siliang.train.state import check_optimizer
from siliang.train.types import Run


def optimizer_state(run: Run, optimizer: AcceleratedOptimizer, groups: list[list[nn.Parameter]]) -> dict[str, object]:
    """The state of a run's optimizer.

    Args:
        optimizer: As accelerate has prepared it.
        groups: The parameters before a strategy replaced them.
    """
    return deepspeed.optimizer_state(optimizer.optimizer, groups) if run.zero_stage else optimizer.state_dict()


def load_optimizer_state(
    run: Run, optimizer: AcceleratedOptimizer, groups: list[list[nn.Parameter]], state: dict[str, object], path: Path
) -> None:
    """Continues from such a state.

    Args:
        path: Of the file, for errors.

    Raises:
        RecordError: The state is not that of this optimizer.
    """
    if run.zero_stage:
        deepspeed.load_optimizer_state(optimizer.optimizer, groups, state)
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    check_optimizer(state, optimizer.state_dict(), parameters, path)
    optimizer.load_state_dict(shard_optimizer_state(deepspeed.without_weights(state), parameters))
