"""Parts of the base model that an adapter trains as copies of its own: whole modules, and single parameters."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from siliang.methods.base import by_row, trained_dtype


class SavedModule(nn.Module):
    """A module of the base model (a head, an embedding) of which each adapter trains and saves a copy of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.active: str | None = None
        self.row_adapters: tuple[str, ...] | None = None
        self.train(module.training)

    def add_adapter(self, name: str) -> None:
        """Copies the original for adapter `name`, in fp32 where it is in half precision."""
        twin = copy.deepcopy(self.original_module)
        for p in twin.parameters():
            p.data = p.data.to(trained_dtype(p))
        self.modules_to_save[name] = twin

    def delete_adapter(self, name: str) -> None:
        """Forgets adapter `name`, if it has a copy here."""
        if name in self.modules_to_save:
            del self.modules_to_save[name]

    @property
    def current(self) -> nn.Module:
        return self.original_module if self.active is None else self.modules_to_save[self.active]

    @property
    def weight(self) -> Tensor:  # of a head or an embedding that other modules look into
        return self.current.weight  # type: ignore[return-value]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.row_adapters is None:
            return self._run(self.current, x, *args, **kwargs)
        modules = self.modules_to_save
        return by_row(
            self.row_adapters,
            x,
            lambda name, part: self._run(
                modules[name] if name in modules else self.original_module,  # noqa: SIM401, ModuleDict has no get
                part,
                *args,
                **kwargs,
            ),
        )

    def _run(self, module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
            x = x.to(next(module.parameters()).dtype)
        out = module(x, *args, **kwargs)
        if isinstance(module, nn.Embedding):
            # what is trained in fp32 goes on in the base's format: no CPU norms fp32 with weights in half precision
            out = out.to(self.original_module.weight.dtype)  # type: ignore[arg-type]
        return out


@dataclass
class Swap:
    """A parameter of the base model that adapters put others in the place of.

    Attributes:
        sites: Every (module, attribute) that holds it: one, or several where it is tied.
    """

    original: nn.Parameter
    sites: list[tuple[nn.Module, str]]
    adapters: dict[str, nn.Parameter] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, path: str) -> Swap:
        original = model.get_parameter(path)
        sites = [
            (module, attribute)
            for module in model.modules()
            for attribute, p in module.named_parameters(recurse=False, remove_duplicate=False)
            if p is original
        ]
        return cls(original, sites)

    def put(self, name: str | None) -> None:
        """Puts adapter `name`'s parameter, or the original, where the model reads it."""
        chosen = self.original if name is None else self.adapters[name]
        module, attribute = self.sites[0]
        standing = getattr(module, attribute)
        # those put aside do not move with the model
        chosen.data = chosen.data.to(device=standing.device)
        for module, attribute in self.sites:
            setattr(module, attribute, chosen)
