"""A model whose weights are sharded over the ranks by torch's FSDP2: each layer is gathered where it computes.

What a method trains on a frozen base is small. It stays whole on every rank, and its gradients are averaged in one
message a step: as shards they would take part in the gathering of every layer, twice a step. What is trained as a whole
(full tuning) is sharded with the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from siliang.capabilities import why_missing
from siliang.language import Bilingual, local
from siliang.models.introspect import transformer_layers
from siliang.models.quantized import keep_states
from siliang.peft_api.model import PeftModel
from siliang.types import ConfigError


def rank_mesh(device: torch.device) -> DeviceMesh:
    """The mesh of all ranks, over which weights are sharded."""
    return init_device_mesh(device.type, (dist.get_world_size(),))


# The name makes a fake mesh differ from the real one. DTensor caches what it knows of an operator by mesh, the mesh
# itself included: a planned step would otherwise pass its fake mesh, which never waits, to the real steps.
FAKE = ("fake",)

T = TypeVar("T")


@contextmanager
def fake_mesh(ranks: int) -> Iterator[DeviceMesh | None]:
    """A mesh of so many ranks of which only this one exists: collectives return at once, with nothing from the others.
    None for a single rank. Where real ranks exist, all of them must call this.

    Raises:
        ConfigError: The installed torch has no fake ranks.
    """
    if ranks == 1:
        yield None
        return
    if (missing := why_missing("fake process groups")) is not None:
        raise ConfigError(
            Bilingual(
                f"A run on several devices cannot be planned: {missing}.",
                f"无法预估多设备的运行：{local(missing, 'zh')}。",
            )
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore  # importing it makes the backend known

    if dist.is_initialized():
        group = dist.new_group(backend="fake")
        assert isinstance(group, dist.ProcessGroup)
        yield DeviceMesh.from_group(group, "cpu", mesh_dim_names=FAKE)
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield init_device_mesh("cpu", (ranks,), mesh_dim_names=FAKE)
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Shards the model's weights, layer by layer, on `device`; the model keeps its names and its type."""
    keep_states(model)
    whole = {p for p in model.parameters() if not _can_be_sharded(p)}
    if isinstance(model, PeftModel):
        whole |= _of_adapters(model)
    for p in whole:
        p.data = p.data.to(device)
    for layer in transformer_layers(model):
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    # embeddings, the last norm and the output layer are gathered once a step: the loss reads the output layer after
    # the model's forward
    fully_shard(model, mesh=mesh, ignored_params=whole, reshard_after_forward=False)


def ignore_frozen_in_ddp(model: nn.Module) -> None:
    """DDP sends neither frozen parameters nor buffers, which are the same on every rank: it would broadcast all of them
    at the start, and buffers in every step."""
    if why_missing("DDP of trained parameters only") is not None:
        return  # the result is the same, and takes longer
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad] + [n for n, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has sharded it."""
    return isinstance(model, FSDPModule)


def average_gradients(model: nn.Module) -> None:
    """Averages the gradients of what every rank holds whole, in one message; those of shards were averaged in the
    backward pass."""
    trained = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if not trained:
        return
    for p in trained:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for dtype in dict.fromkeys(p.dtype for p in trained):  # in the same order on every rank, unlike a set
        grads: list[Tensor] = [p.grad for p in trained if p.grad is not None and p.dtype == dtype]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Within the block the gradients of shards are accumulated and not reduced over the ranks."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def reshard(model: nn.Module) -> None:
    """Frees the embeddings and the output layer, which a forward pass leaves gathered; every rank holds its shard."""
    if isinstance(model, FSDPModule):
        model.reshard()


def full_tensors(tree: T) -> T:
    """The same tree of state with its shards gathered; all ranks must call this."""

    def gather(leaf: object) -> object:
        # a copy, and not a view of what may still be under way
        return leaf.full_tensor().detach().clone() if isinstance(leaf, DTensor) else leaf

    return tree_map(gather, tree)


def shard_optimizer_state(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """An optimizer's state of full tensors, sharded as its parameters are."""
    for number, kept in state["state"].items():
        p = parameters[int(number)]
        if isinstance(p, DTensor):
            for name, value in kept.items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    kept[name] = _sharded_like(value, p)
    return state


@torch.no_grad()
def copy_full(target: Tensor, value: Tensor) -> None:
    """Copies a full tensor into one that may be sharded."""
    target.copy_(_sharded_like(value, target) if isinstance(target, DTensor) else value)


def _sharded_like(value: Tensor, like: DTensor) -> Tensor:
    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements)


def _of_adapters(model: PeftModel) -> set[nn.Parameter]:
    """What is trained, and what adapters save without training it, such as MiCA's B."""
    layers = [layer for adapter in model.injection.adapters.values() for layer in adapter.layers.values()]
    saved = {t for layer in layers for t in layer.tensors().values() if isinstance(t, nn.Parameter)}
    return saved | {p for p in model.parameters() if p.requires_grad}


def _can_be_sharded(p: nn.Parameter) -> bool:
    """Weights in 8 bits cannot: a DTensor holds numbers that could have gradients."""
    return p.is_floating_point() and p.numel() > 0
