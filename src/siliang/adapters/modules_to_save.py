"""Modules of the base model that an adapter trains and saves as copies of its own: `modules_to_save`."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from siliang.adapters.parameter_override import resized
from siliang.adapters.tied_weights import replace_parameter
from siliang.methods.layer import trained_dtype
from siliang.methods.rows import Rows
from siliang.types import ConfigError


class SavedModule(nn.Module):
    """A module of the base model (a head, an embedding) of which adapters train and save copies of their own.

    It stands where the module stood, and outside of a wrapped layer that stands there too. Copies are of the base's
    own module: what other adapters have attached within it is in `original_module` alone.

    Attributes:
        active: The adapter whose copy computes; None for the module itself.
        rows: For a batch that mixes adapters, the one of each row; None otherwise.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.active: str | None = None
        self.rows: Rows | None = None
        self.train(module.training)

    def add_adapter(self, name: str, own: nn.Module) -> None:
        """Copies the base's own module for adapter `name`, in fp32 where it is in half precision."""
        twin = copy.deepcopy(own)
        for p in twin.parameters():
            p.data = p.data.to(trained_dtype(p))
            p.requires_grad_(False)
        self.modules_to_save[name] = twin

    def delete_adapter(self, name: str) -> None:
        """Forgets adapter `name`, if it has a copy here."""
        if name in self.modules_to_save:
            del self.modules_to_save[name]

    def of(self, name: str | None) -> nn.Module:
        """What computes for adapter `name`: its copy, or the module itself."""
        return self.modules_to_save[name] if name is not None and name in self.modules_to_save else self.original_module

    def in_own_format(self, name: str) -> nn.Module:
        """Adapter `name`'s copy, to stand in the module's place for good: in the formats that the base has there."""
        parts = self.original_module.named_parameters()
        formats = {key.replace("base_layer.", "").replace("original_module.", ""): p.dtype for key, p in parts}
        twin = self.modules_to_save[name]
        for key, p in twin.named_parameters():
            p.data = p.data.to(formats.get(key, p.dtype))
        return twin

    def __getattr__(self, name: str) -> Any:
        """What other modules read of a head or an embedding is that of the one at work."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" not in self.__dict__ or name in ("original_module", "modules_to_save", "active", "rows"):
                raise
            return getattr(self.of(self.active), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.rows is None:
            return self._run(self.active, args, kwargs)
        leaves, tree = tree_flatten((args, kwargs))
        x = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), None)
        if x is None:
            raise ConfigError("adapter_names: a module of modules_to_save reads nothing that has rows.")
        names = self.rows.of(x)
        whose = [name if name in self.modules_to_save else None for name in names]
        outs: list[tuple[Tensor, Any]] = []
        for name in dict.fromkeys(whose):
            index = torch.tensor([i for i, n in enumerate(whose) if n == name], device=x.device)
            part_args, part_kwargs = tree_unflatten([_rows_of(leaf, index, len(x)) for leaf in leaves], tree)
            with self.rows.only([names[i] for i in index.tolist()]):
                outs.append((index, self._run(name, part_args, part_kwargs)))
        return _together(outs, len(x))

    def _run(self, name: str | None, args: Any, kwargs: Any) -> Any:
        module = self.of(name)
        if module is self.original_module:
            return module(*args, **kwargs)
        wide, narrow = _dtype(module), _dtype(self.original_module)
        if wide is None or narrow is None or wide == narrow:
            return module(*args, **kwargs)
        # what is trained in fp32 reads fp32, and what goes on is in the base's format
        if not torch.is_autocast_enabled(next(module.parameters()).device.type):
            args, kwargs = tree_map(partial(_in_dtype, wide), (args, kwargs))
        return tree_map(partial(_in_dtype, narrow), module(*args, **kwargs))


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def _in_dtype(dtype: torch.dtype, value: Any) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _rows_of(leaf: Any, index: Tensor, rows: int) -> Any:
    if leaf is None or isinstance(leaf, bool | int | float | str | torch.dtype):
        return leaf
    if not isinstance(leaf, Tensor):
        raise ConfigError(
            f"adapter_names: a module of modules_to_save reads a {type(leaf).__name__}, which cannot be shared out to "
            "rows (for a cache: use_cache=False). Use set_adapter, one adapter at a time."
        )
    if not leaf.dim() or len(leaf) == 1 != rows:
        return leaf
    if len(leaf) != rows:
        raise ConfigError(
            f"adapter_names: a module of modules_to_save reads tensors of {rows} and of {len(leaf)} rows, and whose "
            "they are cannot be told. Use set_adapter, one adapter at a time."
        )
    return leaf[index]


def _together(outs: list[tuple[Tensor, Any]], rows: int) -> Any:
    """The outputs for parts of a batch as one, in the order of the batch."""
    flat = [tree_flatten(out) for _, out in outs]
    joined = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        if not isinstance(leaves[0], Tensor):
            joined.append(leaves[0])
            continue
        whole = leaves[0].new_empty((rows, *leaves[0].shape[1:]))
        for (index, _), leaf in zip(outs, leaves, strict=True):
            if not leaf.dim() or len(leaf) != len(index):
                raise ConfigError("adapter_names: a module of modules_to_save gives something that has no rows.")
            whole = whole.index_copy(0, index, leaf.to(whole.dtype))
        joined.append(whole)
    return tree_unflatten(joined, flat[0][1])


def resized_module(twin: nn.Module, own: nn.Module) -> nn.Module:
    """What an adapter has in the place of a whole module, grown or cut to that one's size."""
    before, now = dict(twin.named_parameters()), dict(own.named_parameters())
    if all(p.shape == now[key].shape for key, p in before.items()):
        return twin
    grown = copy.deepcopy(own)
    grown.train(twin.training)
    for key, p in before.items():
        replace_parameter(grown, key, resized(p, now[key]))
    return grown
