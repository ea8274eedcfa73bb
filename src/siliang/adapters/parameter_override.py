"""Parameters of the base model that an adapter trains as copies of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from siliang.methods.layer import trained_dtype

Places: TypeAlias = list[tuple[nn.Module, str]]  # modules, each with the attribute under which it holds a parameter


@dataclass
class ParameterOverride:
    """A parameter of the base model which the active adapter's own replaces.

    Attributes:
        original: The base's own.
        places: Every (module, attribute) that holds it: one, or several where it is tied.
        adapters: Each adapter's own. That of the active one is read in its place, see `of`.
        active: The adapter whose parameter is in the model; None for the base's own.
    """

    original: nn.Parameter
    places: Places
    adapters: dict[str, nn.Parameter] = field(default_factory=dict)
    active: str | None = None
    _hooks: list[RemovableHandle] = field(default_factory=list)

    def add_adapter(self, name: str) -> None:
        """A copy of the original for adapter `name`, in fp32 where that is in half precision."""
        start = self.original.detach().to(trained_dtype(self.original), copy=True)
        self.adapters[name] = nn.Parameter(start, requires_grad=False)

    def of(self, name: str) -> nn.Parameter:
        """Adapter `name`'s parameter."""
        return self._in_the_model() if name == self.active else self.adapters[name]

    def activate(self, name: str | None) -> None:
        """Puts adapter `name`'s parameter, or the original, where the model reads it."""
        if name == self.active:
            return
        present = self._in_the_model()
        if self.active is None:
            self.original = present
        elif self.active in self.adapters:
            self.adapters[self.active] = present
        self._remove_hooks()
        chosen = self.original if name is None else self.adapters[name]
        chosen.data = chosen.data.to(device=present.device)  # parked ones did not move with the base model
        for module, attribute in self.places:
            setattr(module, attribute, chosen)
            if chosen.dtype != self.original.dtype:
                self._hooks += _cast_in_forward(module, attribute, self)
        self.active = name

    def make_permanent(self, parameter: nn.Parameter) -> None:
        """Leaves `parameter`, which is in the model, there for good, in the original's dtype."""
        self._remove_hooks()
        lasting = nn.Parameter(parameter.detach().to(self.original.dtype))
        for module, attribute in self.places:
            if getattr(module, attribute) is parameter:  # nothing has been merged into it
                setattr(module, attribute, lasting)

    def delete_adapter(self, name: str) -> None:
        """Removes adapter `name`, which must not be the active one."""
        assert name != self.active
        self.adapters.pop(name, None)

    def parked_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the parameters that are not in the model now."""
        if self.active is not None:
            yield self.original
        yield from (p for name, p in self.adapters.items() if name != self.active)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _in_the_model(self) -> nn.Parameter:
        module, attribute = self.places[0]
        return getattr(module, attribute)


def _cast_in_forward(module: nn.Module, attribute: str, override: ParameterOverride) -> list[RemovableHandle]:
    """Lets `module` compute with its parameter in the original's dtype, while the parameter itself stays wider."""
    return [
        module.register_forward_pre_hook(partial(_cast, attribute, override)),
        module.register_forward_hook(partial(_uncast, attribute), always_call=True),
    ]


def _cast(attribute: str, override: ParameterOverride, module: nn.Module, args: object) -> None:
    parameter = module._parameters[attribute]
    assert parameter is not None
    module.__dict__[attribute] = parameter.to(override.original.dtype)


def _uncast(attribute: str, module: nn.Module, args: object, output: object) -> None:
    module.__dict__.pop(attribute, None)


def places_of(model: nn.Module) -> Callable[[nn.Parameter], Places]:
    """A function from a parameter of `model` to the modules that hold it. The modules are searched once."""
    found: dict[int, Places] = {}
    for module in model.modules():
        for attribute, p in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(id(p), []).append((module, attribute))
    return lambda parameter: found[id(parameter)]


def resized(old: nn.Parameter, original: Tensor) -> nn.Parameter:
    """An adapter's copy of a parameter, grown or cut to the size of `original`, whose new rows it takes."""
    if old.shape == original.shape:
        return old
    new = original.detach().to(old.dtype, copy=True)
    n = min(len(old), len(new))
    new[:n] = old.detach()[:n]
    return nn.Parameter(new, requires_grad=old.requires_grad)
