"""The optimizer of a training, and the schedule of its learning rate."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

BETAS = (0.9, 0.999)  # of Adam's moments, torch's own
# biases and the weights of norms are not decayed; the patterns are those of transformers' Trainer
NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def make_optimizer(model: nn.Module, *, learning_rate: float, weight_decay: float, eps: float) -> Optimizer:
    """AdamW over all that is trained, in the groups of `parameter_groups`."""
    return AdamW(parameter_groups(model, weight_decay), lr=learning_rate, betas=BETAS, eps=eps, fused=True)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """The trained parameters that are decayed, then those that are not, as in transformers' Trainer; no empty group:
    DeepSpeed leaves it out, and a checkpoint must be the same with every strategy."""
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NOT_DECAYED))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_schedule(optimizer: Optimizer, name: str, *, warmup_fraction: float, steps: int) -> LRScheduler:
    """The learning rate rises from zero over the first steps, then falls as `name` says.

    Args:
        warmup_fraction: Share of `steps` in which it rises.
    """
    schedule: LRScheduler = get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer=optimizer,
        num_warmup_steps=math.ceil(steps * warmup_fraction),
        num_training_steps=steps,
    )
    return schedule
