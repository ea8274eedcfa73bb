"""A model whose weights are dealt out over the ranks, by torch's FSDP2: each layer is put together where it computes.

What a method trains beside a frozen base is small. It stays whole on every rank, and its gradients are averaged in one
message a step: as shards they would take part in every layer's gathering, twice a step. What is trained as a whole
(full tuning) is dealt out with the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from transformers.modeling_layers import GradientCheckpointingLayer


def all_ranks(device: torch.device) -> DeviceMesh:
    """Those among which weights are dealt out."""
    return init_device_mesh(device.type, (dist.get_world_size(),))


# By its name a mesh on paper is unlike the one that is there. DTensor keeps what it has found out about an operator by
# mesh, the mesh itself included: a planned step would otherwise lend its own, which waits for nobody, to the real ones.
PAPER = ("paper",)


@contextmanager
def paper_ranks(ranks: int) -> Iterator[DeviceMesh | None]:
    """So many ranks of which this one alone exists: what they are sent is gone, what they send is not waited for; None
    for a single one. Where ranks do exist, all of them have to ask."""
    if ranks == 1:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore  # importing it makes the backend known

    if dist.is_initialized():
        group: Any = dist.new_group(backend="fake")
        yield DeviceMesh.from_group(group, "cpu", mesh_dim_names=PAPER)
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield init_device_mesh("cpu", (ranks,), mesh_dim_names=PAPER)
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, mesh: DeviceMesh, device: torch.device, *, trained_too: bool) -> None:
    """Deals out the model's weights, layer by layer, on `device`; the model keeps its names and its type.

    Args:
        trained_too: What is trained as well.
    """
    for m in model.modules():  # bitsandbytes' layers ask for it where their weight has lost it
        if (state := getattr(getattr(m, "weight", None), "quant_state", None)) is not None:
            m.quant_state, m.quant_storage = state, m.weight.dtype  # type: ignore[assignment,union-attr]
    whole = {p for p in model.parameters() if (p.requires_grad and not trained_too) or not _can_be_dealt(p)}
    for p in whole:
        p.data = p.data.to(device)
    for layer in (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)):
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    # embeddings, the last norm and the output layer: put together once a step, since the loss reads the output layer
    # after the model's forward
    fully_shard(model, mesh=mesh, ignored_params=whole, reshard_after_forward=False)


def send_what_is_trained(model: nn.Module) -> None:
    """Tells DDP that the rest is the same everywhere: it would send all of it once, and buffers in every step."""
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad] + [n for n, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has dealt it out."""
    return isinstance(model, FSDPModule)


def average_gradients(model: nn.Module) -> None:
    """Of what every rank holds whole, in one message; the shards' were averaged in the backward pass."""
    trained = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if not trained:
        return
    for p in trained:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for dtype in {p.dtype for p in trained}:
        grads: list[Tensor] = [p.grad for p in trained if p.grad is not None and p.dtype == dtype]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))


@contextmanager
def gradients_stay(model: nn.Module) -> Iterator[None]:
    """Within the block the shards' gradients are summed up without a word to the other ranks."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def apart(model: nn.Module) -> None:
    """A forward pass leaves embeddings and output layer put together: from here on every rank holds its share again."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole(tree: Any) -> Any:
    """The same tree of state with its shards put together; all ranks must ask."""

    def put_together(leaf: Any) -> Any:
        # a copy, and not a view of what may still be under way
        return leaf.full_tensor().detach().clone() if isinstance(leaf, DTensor) else leaf

    return tree_map(put_together, tree)


def dealt(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """An optimiser's state as `whole` gave it, dealt out as its parameters are."""
    for number, kept in state["state"].items():
        p = parameters[int(number)]
        if isinstance(p, DTensor):
            for name, value in kept.items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    kept[name] = _dealt_as(value, p)
    return state


@torch.no_grad()
def set_whole(target: Tensor, value: Tensor) -> None:
    """Puts a whole tensor into one that may be dealt out."""
    target.copy_(_dealt_as(value, target) if isinstance(target, DTensor) else value)


def _dealt_as(value: Tensor, like: DTensor) -> Tensor:
    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements)


def _can_be_dealt(p: nn.Parameter) -> bool:
    """Weights in 8 bits cannot: DTensor takes numbers that could have gradients."""
    return p.is_floating_point() and p.numel() > 0
