"""Parameters of the base model that an adapter trains as copies of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from siliang.methods.layer import trained_dtype


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
