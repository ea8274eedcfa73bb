"""DeepSpeed's ZeRO, through accelerate's own integration. DeepSpeed owns backward, step and gradients. siliang owns
batches, the loss and checkpoints, which hold full tensors under the names that those of every other run have.

ZeRO-2 partitions gradients and Adam's moments among the ranks, ZeRO-3 also the weights, an adapter's too.

`PRIVATE` lists what is reached of other libraries beyond their documented interfaces; the functions below it, and no
others, reach it.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, count
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from siliang.config import RunConfig
from siliang.config.distributed import SET_BY
from siliang.language import Bilingual
from siliang.models.introspect import transformer_layers
from siliang.types import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")

# What is reached beyond documented interfaces: a class, and the names of its objects that are used.
# tests/distributed/test_deepspeed.py says which of them a release no longer has.
PRIVATE = {
    "torch.nn:Module": ("_forward_pre_hooks", "_forward_hooks"),
    "accelerate.state:PartialState": ("distributed_type",),
    "accelerate.state:AcceleratorState": ("_reset_state",),
    "accelerate.state:GradientState": ("_set_sync_gradients",),
    "deepspeed.runtime.zero.partition_parameters:Init": ("ds_id",),
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3": ("fp32_partitioned_groups_flat",),
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer": (
        "single_partition_of_fp32_groups",
        "_hp_optimizer_states_linked",
        "_lazy_init_hp_params_optimizer_state",
    ),
}


def require_deepspeed(device: torch.device, *, half: bool) -> None:
    """Raises an error where DeepSpeed cannot do a run.

    Args:
        half: The run computes in bf16 or fp16.

    Raises:
        ConfigError: DeepSpeed is not installed, or the run computes in half precision on the CPU.
    """
    if find_spec("deepspeed") is None:
        raise ConfigError(
            Bilingual(
                "distributed.strategy = deepspeed needs DeepSpeed, which is not installed.\n"
                "Use strategy=fsdp, which shards as much, or install it: DS_BUILD_OPS=0 pip install "
                "'siliang[deepspeed]'",
                "distributed.strategy = deepspeed 需要 DeepSpeed，而它没有安装。\n"
                "请用分片程度相同的 strategy=fsdp，或安装它："
                "DS_BUILD_OPS=0 pip install 'siliang[deepspeed]'",
            )
        )
    if half and device.type == "cpu":
        raise ConfigError(
            Bilingual(
                "distributed.strategy = deepspeed trains on the CPU in fp32 alone: set train.precision=fp32.",
                "distributed.strategy = deepspeed 在 CPU 上只能用 fp32 训练：请设置 train.precision=fp32。",
            )
        )


def make_plugin(config: RunConfig, ranks: int) -> DeepSpeedPlugin:
    """What accelerate needs to hand the training over to DeepSpeed: the run's own DeepSpeed settings, and those that
    follow from siliang's.

    A "micro batch" of DeepSpeed is a rank's share of a whole step here, which the collator splits again.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    t = config.train
    # the optimizer and the schedule are those of every run
    settings = {
        name: copy.deepcopy(value)
        for name, value in config.distributed.zero.items()
        if name not in ("optimizer", "scheduler", *SET_BY)
    }
    for half in ("bf16", "fp16"):
        settings[half] = {**settings.get(half, {}), "enabled": "auto"}
    rows = t.rows_per_step
    settings |= {
        "train_batch_size": rows * ranks,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": t.max_grad_norm,
    }
    _choose_deepspeed()
    return DeepSpeedPlugin(hf_ds_config=settings)


def gather_by_layer(model: nn.Module) -> None:
    """Has ZeRO-3 gather a whole layer's weights where the layer's forward begins. Left alone it gathers those of each
    module by itself, and siliang's forwards also read the weights of modules within."""
    for layer in transformer_layers(model):
        _deepspeed().utils.set_z3_leaf_module(layer, True)


@contextmanager
def gathered(tensors: Sequence[Tensor], *, writing: bool = False) -> Iterator[None]:
    """Within the block the partitioned ones among these tensors are full, on every rank. Collective: every rank must
    enter it.

    Args:
        writing: What rank 0 writes into them is kept.
    """
    partitioned = [t for t in tensors if is_partitioned(t)]
    if not partitioned:
        yield
        return
    with _deepspeed().zero.GatheredParameters(partitioned, modifier_rank=0 if writing else None):
        yield


def optimizer_state(optimizer: Any, trained: list[list[nn.Parameter]]) -> dict[str, Any]:
    """The state_dict that torch's AdamW would have, in full tensors. Collective: every rank must call it.

    Args:
        optimizer: DeepSpeed's.
        trained: The parameters of each group, as AdamW was given them.
    """
    utils, inner = _deepspeed().utils, optimizer.optimizer
    steps = [kept["step"] for kept in inner.state.values() if "step" in kept]
    _link_moments(optimizer)
    state: dict[int, dict[str, Tensor]] = {}
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
    """Loads a state_dict of torch's AdamW, or what `optimizer_state` returned. Collective."""
    utils, inner, kept = _deepspeed().utils, optimizer.optimizer, state["state"]
    if kept:
        step = next(iter(kept.values()))["step"]
        flat = _flat_parameters(optimizer)
        for part in flat:
            inner.state[part] = {"step": torch.as_tensor(step, dtype=torch.float32).clone()}
            inner.state[part] |= {name: torch.zeros_like(part.data) for name in MOMENTS}
        _link_moments(optimizer)
        for number, p in enumerate(chain(*trained)):
            for name in MOMENTS:
                utils.safe_set_full_optimizer_state(p, kept[number][name].to(flat[0].device), name)
            if "weight" in kept[number]:
                utils.safe_set_full_fp32_param(p, kept[number]["weight"].to(flat[0].device))
    for group, saved in zip(inner.param_groups, state["param_groups"], strict=True):
        group.update({k: v for k, v in saved.items() if k != "params"})


def without_weights(state: dict[str, Any]) -> dict[str, Any]:
    """What `optimizer_state` returned, for an AdamW whose parameters are in full precision themselves."""
    for kept in state["state"].values():
        kept.pop("weight", None)
    return state


# ---- what is private to other libraries: see PRIVATE ----


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 has partitioned a parameter."""
    return hasattr(tensor, "ds_id")


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Within the block modules are called without DeepSpeed's hooks. ZeRO-3 counts the calls of a step, and a rank that
    makes more calls than the others waits for ever."""
    kept = [(m, m._forward_pre_hooks, m._forward_hooks) for m in model.modules()]
    for m, _, _ in kept:
        m._forward_pre_hooks, m._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for m, before, after in kept:
            m._forward_pre_hooks, m._forward_hooks = before, after


@contextmanager
def no_sync(accelerator: Accelerator) -> Iterator[None]:
    """Within the block a backward pass adds to the gradients, and DeepSpeed makes no step after it."""
    accelerator.gradient_state._set_sync_gradients(False)
    try:
        yield
    finally:
        accelerator.gradient_state._set_sync_gradients(True)


def _choose_deepspeed() -> None:
    """accelerate would make a new state, and that knows DeepSpeed on CUDA alone."""
    AcceleratorState._reset_state()
    PartialState().distributed_type = DistributedType.DEEPSPEED


def _flat_parameters(optimizer: Any) -> list[Tensor]:
    """This rank's part of each group's parameters, in full precision and in one dimension."""
    if _is_zero_3(optimizer):
        return optimizer.fp32_partitioned_groups_flat
    return optimizer.single_partition_of_fp32_groups


def _link_moments(optimizer: Any) -> None:
    """Lets each parameter find its moments. ZeRO-1 and 2 do so only when the first group has made its first step
    (DeepSpeed 0.19.8), and the moments of the other groups are not there yet."""
    if not _is_zero_3(optimizer):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _is_zero_3(optimizer: object) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _deepspeed() -> ModuleType:
    return import_module("deepspeed")
