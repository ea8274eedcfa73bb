"""DeepSpeed's ZeRO, through accelerate's own integration: DeepSpeed owns backward, step and gradients, and siliang its
batches, its loss and its checkpoints, which hold whole tensors under the names that every other run's have.

ZeRO-2 deals out gradients and Adam's moments, ZeRO-3 the weights too, those of an adapter as well.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, count
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from torch import Tensor, nn

from siliang.config import RunConfig
from siliang.models.introspect import checkpointed_layers
from siliang.types import ConfigError
from siliang.zero_settings import SAID_BY

MOMENTS = ("exp_avg", "exp_avg_sq")


def require_deepspeed(device: torch.device, *, half: bool) -> None:
    """
    Args:
        half: The run computes in bf16 or fp16.

    Raises:
        ConfigError: It is not installed; or the run is one that transformers hands over to it on cards alone.
    """
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "distributed.strategy = deepspeed needs DeepSpeed, which is not installed.\n"
            "Use strategy=fsdp, which deals out as much, or install it: DS_BUILD_OPS=0 pip install 'siliang[deepspeed]'"
        )
    if half and device.type == "cpu":
        raise ConfigError("distributed.strategy = deepspeed trains on the CPU in fp32 alone: set train.precision=fp32.")


def trainer_arguments(config: RunConfig) -> dict[str, Any]:
    """What TrainingArguments needs to hand the training over to DeepSpeed: the run's own settings, and "auto" for what
    siliang's say."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    settings = copy.deepcopy(config.distributed.zero)
    # the optimiser and the schedule are those of every run
    settings = {name: value for name, value in settings.items() if name not in ("optimizer", "scheduler")}
    halves = {name: {**settings.get(name, {}), "enabled": "auto"} for name in ("bf16", "fp16")}
    # TrainingArguments would make a new state, for which accelerate knows DeepSpeed on cards alone
    PartialState().distributed_type = DistributedType.DEEPSPEED
    return {
        "deepspeed": settings | halves | dict.fromkeys(SAID_BY, "auto"),
        "accelerator_config": {"use_configured_state": True},
    }


def put_together_by_layer(model: nn.Module) -> None:
    """ZeRO-3 puts weights together where a module's forward begins; ours reads those of the modules within it, too."""
    for layer in checkpointed_layers(model):
        _deepspeed().utils.set_z3_leaf_module(layer, True)


def is_dealt(tensor: Tensor) -> bool:
    """Whether ZeRO-3 has dealt it out."""
    return hasattr(tensor, "ds_id")


@contextmanager
def together(tensors: list[Any], *, changing: bool = False) -> Iterator[None]:
    """Within the block those of them that are dealt out are whole, on all ranks, which all have to come here.

    Args:
        changing: What the first rank makes of them is kept.
    """
    dealt = [t for t in tensors if is_dealt(t)]
    if not dealt:
        yield
        return
    with _deepspeed().zero.GatheredParameters(dealt, modifier_rank=0 if changing else None):
        yield


@contextmanager
def unheard(model: nn.Module) -> Iterator[None]:
    """Within the block modules are called without DeepSpeed's hooks: ZeRO-3 counts the calls of a step, and a rank that
    has made more of them waits for ever."""
    kept = [(m, m._forward_pre_hooks, m._forward_hooks) for m in model.modules()]
    for m, _, _ in kept:
        m._forward_pre_hooks, m._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for m, before, after in kept:
            m._forward_pre_hooks, m._forward_hooks = before, after


@contextmanager
def batches_to_come(accelerator: Any) -> Iterator[None]:
    """Within the block a backward pass sums up gradients, and DeepSpeed makes no step after it."""
    accelerator.gradient_state._set_sync_gradients(False)
    try:
        yield
    finally:
        accelerator.gradient_state._set_sync_gradients(True)


def optimizer_state(optimizer: Any, trained: list[list[nn.Parameter]]) -> dict[str, Any]:
    """The state_dict that torch's AdamW would have, whole; all ranks must ask.

    Args:
        optimizer: DeepSpeed's.
        trained: The parameters of each group, as AdamW was given them.
    """
    utils, inner = _deepspeed().utils, optimizer.optimizer
    steps = [kept["step"] for kept in inner.state.values() if "step" in kept]
    _link(optimizer)
    state: dict[int, dict[str, Any]] = {}
    for number, p in enumerate(chain(*trained) if steps else []):
        moments = {name: utils.safe_get_full_optimizer_state(p, name).cpu().clone() for name in MOMENTS}
        state[number] = {"step": steps[0].detach().clone(), **moments}
        if p.dtype != torch.float32:
            state[number]["weight"] = utils.safe_get_full_fp32_param(p).cpu().clone()
    numbers = count()
    own = [[next(numbers) for _ in group] for group in trained]
    groups = [group | {"params": ids} for group, ids in zip(inner.param_groups, own, strict=True)]
    return {"state": state, "param_groups": groups}


def load_optimizer_state(optimizer: Any, trained: list[list[nn.Parameter]], state: dict[str, Any]) -> None:
    """Goes on from a state_dict of torch's AdamW, or from `optimizer_state`."""
    utils, inner, kept = _deepspeed().utils, optimizer.optimizer, state["state"]
    if kept:
        step = next(iter(kept.values()))["step"]
        three = _is_zero_3(optimizer)
        flat = optimizer.fp32_partitioned_groups_flat if three else optimizer.single_partition_of_fp32_groups
        for part in flat:
            inner.state[part] = {"step": torch.as_tensor(step, dtype=torch.float32).clone()}
            inner.state[part] |= {name: torch.zeros_like(part.data) for name in MOMENTS}
        _link(optimizer)
        for number, p in enumerate(chain(*trained)):
            for name in MOMENTS:
                utils.safe_set_full_optimizer_state(p, kept[number][name].to(flat[0].device), name)
            if "weight" in kept[number]:
                utils.safe_set_full_fp32_param(p, kept[number]["weight"].to(flat[0].device))
    for group, saved in zip(inner.param_groups, state["param_groups"], strict=True):
        group.update({k: v for k, v in saved.items() if k != "params"})


def without_weights(state: dict[str, Any]) -> dict[str, Any]:
    """`optimizer_state` for an AdamW whose weights are in full precision themselves."""
    for kept in state["state"].values():
        kept.pop("weight", None)
    return state


def _link(optimizer: Any) -> None:
    """ZeRO-1 and 2 tell each weight where its moments are when the first group of weights has made its first step
    (DeepSpeed 0.19.8), and those of the other groups are not there yet."""
    if not _is_zero_3(optimizer):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _is_zero_3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _deepspeed() -> Any:
    return import_module("deepspeed")
