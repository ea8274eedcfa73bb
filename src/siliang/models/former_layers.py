"""The linear layers of transformers 4 that are parameters of a mixture of experts since transformers 5.

The experts of a layer are one tensor now, and the router is a module of its own kind. In the files of a base model, and
in adapters that were trained with transformers 4, each expert has layers of its own:

    model.layers.0.block_sparse_moe.experts.3.w1    the upper half of model.layers.0.mlp.experts.gate_up_proj[3]

These are the names by which transformers saves a model.

Shapes: (E, O, I), of a router (O, I); E experts, O features out, I features in.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel

from siliang.capabilities import why_missing
from siliang.module_paths import plain_modules


@dataclass(frozen=True)
class FormerLayer:
    """A linear layer of transformers 4.

    Attributes:
        path: Its path.
        parameter: The path of the parameter that has its weight now.
        expert: The expert that it is in; None for a router.
        start: The first row that it has of the expert's matrix.
        rows: How many rows it has, one after the other.
    """

    path: str
    parameter: str
    expert: int | None
    start: int
    rows: int

    @property
    def module(self) -> str:
        """The path of the module that holds the parameter."""
        return self.parameter.rpartition(".")[0]


MOST_KNOWN = 4
_known = dict[object, list[FormerLayer]]()  # 9 s of work for 78 layers of 256 experts; a plan attaches many adapters


def former_layers(model: nn.Module) -> list[FormerLayer]:
    """Those of a base model without adapters, by parameter, expert and row. None in a model without such parameters."""
    shapes = dict(_shapes(model))
    if not isinstance(model, PreTrainedModel) or not shapes or why_missing("adapters of transformers 4"):
        return []
    kind = type(model), tuple(shapes.items())
    if kind not in _known:
        while len(_known) >= MOST_KNOWN:
            _known.pop(next(iter(_known)))
        _known[kind] = _find(model, shapes)
    return list(_known[kind])


def _find(model: PreTrainedModel, shapes: Mapping[str, torch.Size]) -> list[FormerLayer]:
    alike = copy.copy(model)
    alike.__dict__.pop("_weight_conversions", None)  # those of the files that it was loaded from, which may be new ones
    with unset_fake_temporarily():
        found = list(_located(_as_saved(alike, _numbered(shapes)), shapes))
    order = {path: n for n, path in enumerate(shapes)}
    return sorted(found, key=lambda layer: (order[layer.parameter], layer.expert or 0, layer.start))


def _shapes(model: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    """The shapes of the experts' parameters and of the routers beside them, which have a row for each expert."""
    for path, module in plain_modules(model):
        experts = {name: p.shape for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
        of_torch = type(module).__module__.startswith("torch.")  # a convolution
        if not experts or not path or of_torch or getattr(module, "is_transposed", False):
            continue
        yield from ((f"{path}.{name}", shape) for name, shape in experts.items())
        n_experts = {shape[0] for shape in experts.values()}
        parent = path.rpartition(".")[0]
        for name, other in model.get_submodule(parent).named_children():
            weight = getattr(other, "weight", None)
            if not isinstance(weight, nn.Parameter) or isinstance(other, nn.Linear | nn.Embedding):
                continue
            if weight.dim() == 2 and weight.shape[0] in n_experts:
                yield f"{parent}.{name}.weight" if parent else f"{name}.weight", weight.shape


def _numbered(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The numbers of the rows of each parameter, (E, O, 1); they go on from one parameter to the next."""
    total, numbers = 0, dict[str, Tensor]()
    for path, shape in shapes.items():
        n = math.prod(shape[:-1])
        numbers[path] = torch.arange(total, total + n, device="cpu").view(*shape[:-1], 1)
        total += n
    return numbers


def _as_saved(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model by the names, and in the parts, in which transformers saves them."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return revert_weight_conversion(model, tensors)
    except NotImplementedError:  # its files have another format, in which it cannot be saved
        return {}


def _located(saved: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> Iterator[FormerLayer]:
    """The layers among what is saved: what has consecutive rows of one expert, or of a router."""
    paths, starts = list(shapes), [0]
    for shape in shapes.values():
        starts.append(starts[-1] + math.prod(shape[:-1]))
    for key, numbers in saved.items():
        if not key.endswith(".weight") or numbers.dim() != 2 or numbers.shape[1] != 1:
            continue
        first, rows = int(numbers[0]), len(numbers)
        n = bisect(starts, first) - 1
        shape = shapes[paths[n]]
        expert, start = divmod(first - starts[n], shape[-2])
        consecutive = torch.arange(first, first + rows, device=numbers.device)
        if start + rows <= shape[-2] and torch.equal(numbers.flatten(), consecutive):
            yield FormerLayer(key.removesuffix(".weight"), paths[n], expert if len(shape) == 3 else None, start, rows)
