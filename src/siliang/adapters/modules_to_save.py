"""Modules of the base model that an adapter trains and saves as copies of its own: `modules_to_save`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from siliang.adapters.parameter_override import resized
from siliang.adapters.tied_weights import replace_parameter
from siliang.methods.adapter_names import AdapterNames, by_row
from siliang.methods.layer import trained_dtype

OWN = ("original_module", "modules_to_save", "active", "rows", "routed")


class ModulesToSaveWrapper(nn.Module):
    """A module of the base model (a head, an embedding) of which adapters train and save copies of their own.

    It takes the module's place in the model, outside of an AdaptedLayer at the same path. Copies are of the base's own
    module: what other adapters have attached within it is in `original_module` alone.

    Attributes:
        active: The adapter whose copy computes; None for the module itself.
        rows: For a batch that mixes adapters, the one of each row; None otherwise.
        routed: It may read any tokens of the batch, in any order (`is_routed`).
        active_adapters, merged_adapters, disable_adapters: What PEFT's wrapper has under these names.
        adapter_layer_names, other_param_names: The attributes that hold parts of adapters, and settings.
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("modules_to_save",)
    other_param_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, module: nn.Module, *, routed: bool = False) -> None:
        super().__init__()
        self.original_module, self.routed = module, routed
        self.modules_to_save = nn.ModuleDict()
        self.active: str | None = None
        self.rows: AdapterNames | None = None
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.disable_adapters = False
        self.train(module.training)

    def add_adapter(self, name: str, base_module: nn.Module) -> None:
        """Copies the base's own module for adapter `name`, in fp32 where it is in half precision."""
        own = copy.deepcopy(base_module)
        for p in own.parameters():
            p.data = p.data.to(trained_dtype(p))
            p.requires_grad_(False)
        self.modules_to_save[name] = own

    def delete_adapter(self, name: str) -> None:
        """Removes adapter `name`, if it has a copy here."""
        if name in self.modules_to_save:
            del self.modules_to_save[name]

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes one adapter's copy the one that computes, and trained, until the model's own functions set all again.

        Args:
            inference_mode: Freeze it too.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.active_adapters = [name for name in names if name in self.modules_to_save]
        self.active = None if self.disable_adapters else next(iter(self.active_adapters), None)
        for name, own in self.modules_to_save.items():
            own.requires_grad_(name == self.active and not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Lets the active adapter's copy compute, or the module itself."""
        self.disable_adapters = not enabled
        self.set_adapter(self.active_adapters, inference_mode=not enabled)

    def module_of(self, name: str | None) -> nn.Module:
        """What computes for adapter `name`: its copy, or the module itself."""
        return self.modules_to_save[name] if name is not None and name in self.modules_to_save else self.original_module

    def in_base_dtypes(self, name: str) -> nn.Module:
        """Adapter `name`'s copy in the dtypes of the base's module, to replace that for good."""
        parts = self.original_module.named_parameters()
        dtypes = {key.replace("base_layer.", "").replace("original_module.", ""): p.dtype for key, p in parts}
        own = self.modules_to_save[name]
        for key, p in own.named_parameters():
            p.data = p.data.to(dtypes.get(key, p.dtype))
        return own

    def __getattr__(self, name: str) -> Any:
        """What other modules read of a head or an embedding is read of the active one."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" not in self.__dict__ or name in OWN:
                raise
            return getattr(self.module_of(self.active), name)

    def forward(self, *args: object, **kwargs: object) -> object:
        if self.rows is None:
            return self._run(self.active, *args, **kwargs)

        def copy_of(name: str) -> str | None:
            return name if name in self.modules_to_save else None

        where = "a module of modules_to_save"
        return by_row(self.rows, args, kwargs, self._run, where=where, routed=self.routed, copy_of=copy_of)

    def _run(self, name: str | None, *args: object, **kwargs: object) -> object:
        module = self.module_of(name)
        if module is self.original_module:
            return module(*args, **kwargs)
        wide, narrow = _dtype(module), _dtype(self.original_module)
        if wide is None or narrow is None or wide == narrow:
            return module(*args, **kwargs)
        # what is trained in fp32 reads fp32, and the model continues in the base's dtype
        if not torch.is_autocast_enabled(next(module.parameters()).device.type):
            args, kwargs = tree_map(partial(_in_dtype, wide), (args, kwargs))
        return tree_map(partial(_in_dtype, narrow), module(*args, **kwargs))


def resized_module(own: nn.Module, base_module: nn.Module) -> nn.Module:
    """An adapter's copy of a module, grown or cut to the base module's new size."""
    before, now = dict(own.named_parameters()), dict(base_module.named_parameters())
    if all(p.shape == now[key].shape for key, p in before.items()):
        return own
    new = copy.deepcopy(base_module)
    new.train(own.training)
    for key, p in before.items():
        replace_parameter(new, key, resized(p, now[key]))
    return new


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def _in_dtype(dtype: torch.dtype, value: object) -> object:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
