"""The optimizer of a planned step. bitsandbytes does not run on fake tensors: a dummy of the same size replaces it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from siliang.config import TrainConfig
from siliang.train.optimizer import OPTIMIZERS, Groups, make_optimizer, parameter_groups

SMALL_8BIT = 4096  # bitsandbytes keeps the state of smaller parameters in 32 bits
BLOCK_8BIT = 256  # numbers that share a scale


def make_planned_optimizer(model: nn.Module, settings: TrainConfig, heads: Sequence[str]) -> Optimizer:
    """An optimizer whose state is as large as that of the run's optimizer.

    Args:
        model: Its tensors may be fake or real.
        heads: Names of the modules of the task's head.
    """
    is_fake = any(isinstance(p, FakeTensor) for p in model.parameters())
    if is_fake and not OPTIMIZERS[settings.optimizer].on_fake:
        return Moments8bit(parameter_groups(model, settings, 0.0))
    return make_optimizer(model, settings, heads=heads, learning_rate=0.0, eps=1e-8)


class Moments8bit(Optimizer):
    """A dummy of bitsandbytes' 8-bit AdamW: it holds the same state, and changes no parameter."""

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups, {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Allocates the state."""
        for p in (p for group in self.param_groups for p in group["params"] if not self.state[p]):
            small = p.numel() < SMALL_8BIT
            for moment in ("1", "2"):
                dtype = torch.float32 if small else torch.uint8
                self.state[p][f"state{moment}"] = torch.zeros_like(p, dtype=dtype)
                if not small:
                    blocks = -(-p.numel() // BLOCK_8BIT)
                    self.state[p][f"absmax{moment}"] = torch.zeros(blocks, dtype=torch.float32, device=p.device)
