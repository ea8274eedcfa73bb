"""Parts of the base model that an adapter trains as copies of its own: whole modules, and single parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from siliang.methods.layer import trained_dtype
from siliang.methods.rows import Rows
from siliang.tied_weights import replace_parameter
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


@dataclass
class Swap:
    """A parameter of the base model that adapters put others in the place of.

    Attributes:
        original: The base's own.
        sites: Every (module, attribute) that holds it: one, or several where it is tied.
        adapters: What each adapter puts there. What stands there just now is read where it stands.
        standing: The adapter whose parameter stands there; None for the base's own.
    """

    original: nn.Parameter
    sites: list[tuple[nn.Module, str]]
    adapters: dict[str, nn.Parameter] = field(default_factory=dict)
    standing: str | None = None
    _hooks: list[Any] = field(default_factory=list)

    def add_adapter(self, name: str) -> None:
        """A copy of the original for adapter `name`, in fp32 where that is in half precision."""
        start = self.original.detach().to(trained_dtype(self.original), copy=True)
        self.adapters[name] = nn.Parameter(start, requires_grad=False)

    def of(self, name: str) -> nn.Parameter:
        """Adapter `name`'s parameter."""
        return self._there() if name == self.standing else self.adapters[name]

    def put(self, name: str | None) -> None:
        """Puts adapter `name`'s parameter, or the original, where the model reads it."""
        if name == self.standing:
            return
        there = self._there()
        if self.standing is None:
            self.original = there
        elif self.standing in self.adapters:
            self.adapters[self.standing] = there
        self._unhook()
        chosen = self.original if name is None else self.adapters[name]
        chosen.data = chosen.data.to(device=there.device)  # those put aside did not move with the base model
        for module, attribute in self.sites:
            setattr(module, attribute, chosen)
            if chosen.dtype != self.original.dtype:
                self._hooks += _narrowed(module, attribute, self)
        self.standing = name

    def stay(self, parameter: nn.Parameter) -> None:
        """Leaves what stands there, `parameter`, in its place for good, in the original's format."""
        self._unhook()
        lasting = nn.Parameter(parameter.detach().to(self.original.dtype))
        for module, attribute in self.sites:
            if getattr(module, attribute) is parameter:  # nothing has been merged into it
                setattr(module, attribute, lasting)

    def delete_adapter(self, name: str) -> None:
        """Forgets adapter `name`; it must not stand there."""
        assert name != self.standing
        self.adapters.pop(name, None)

    def aside(self) -> Iterator[nn.Parameter]:
        """Those of the parameters that do not stand there now."""
        if self.standing is not None:
            yield self.original
        yield from (p for name, p in self.adapters.items() if name != self.standing)

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _there(self) -> nn.Parameter:
        module, attribute = self.sites[0]
        return getattr(module, attribute)


def _narrowed(module: nn.Module, attribute: str, swap: Swap) -> list[Any]:
    """Lets `module` compute with its parameter in the original's format, while the parameter itself stays wider."""
    return [
        module.register_forward_pre_hook(partial(_narrow, attribute, swap)),
        module.register_forward_hook(partial(_widen, attribute), always_call=True),
    ]


def _narrow(attribute: str, swap: Swap, module: nn.Module, args: Any) -> None:
    parameter = module._parameters[attribute]
    assert parameter is not None
    module.__dict__[attribute] = parameter.to(swap.original.dtype)


def _widen(attribute: str, module: nn.Module, args: Any, output: Any) -> None:
    module.__dict__.pop(attribute, None)


def sites_of(model: nn.Module) -> Callable[[nn.Parameter], list[tuple[nn.Module, str]]]:
    """Where each parameter of `model` is held, looked up once for all."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, p in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(id(p), []).append((module, attribute))
    return lambda parameter: found[id(parameter)]


def resized(old: nn.Parameter, original: Tensor) -> nn.Parameter:
    """What an adapter has in the place of `original`, grown or cut to its size."""
    if old.shape == original.shape:
        return old
    new = original.detach().to(old.dtype, copy=True)
    n = min(len(old), len(new))
    new[:n] = old.detach()[:n]
    return nn.Parameter(new, requires_grad=old.requires_grad)


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
