"""A layer of the base model with adapters on it, and what one adapter is on one layer.

An adapter on a layer is a function of what the layer reads and of what stands beneath it: the base layer, or another
adapter on it. The last active one is the outermost:

    y = adapter_k(x, adapter_k-1( ... base layer))

Merging applies them in the same order, each to the weight that the ones before it left.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from siliang.methods.rows import Rows, by_row
from siliang.models.quantized import is_quantized
from siliang.types import MergeError


class AdaptedLayer(nn.Module):
    """A layer of the base model with named adapters on it, of one method or of several.

    It stands where the base layer stood and keeps it as `base_layer`. Nothing here asks what kind that is, so the same
    class serves full-precision and quantized layers. The parts of the adapters are listed under PEFT's names, such as
    `lora_A.<adapter>`. Adapters are made while the base layer has its own parameters: inject.py sees to that, and then
    says which of them stand there (`stand`).

    Attributes:
        active: The adapters that compute, the innermost first.
        merged: Those that are in the base layer's own parameters; the layer computes with these alone then, as in PEFT.
        rows: For a batch that mixes adapters, the one of each row; None otherwise.
    """

    base_layer: Any  # nn.Linear and its quantized kin, nn.Embedding, a norm ...

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.rows: Rows | None = None
        # Dicts, so that nothing in them is listed a second time among the layer's parameters.
        self._adapters: dict[str, LayerAdapter] = {}
        self._own: dict[str, nn.Parameter] = {}  # the base layer's parameters in whose place others stand
        self._merged: dict[str, nn.Parameter] = {}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.rows is None:
            return self._compute(() if self.merged else self.active, x, args, kwargs)

        def run(name: str, part: Tensor) -> Tensor:
            with self._with_parameters_of([name]):
                return self._compute([name], part, args, kwargs)

        return by_row(self.rows.of(x), x, run)

    def _compute(self, names: Sequence[str], x: Tensor, args: Any, kwargs: Any) -> Tensor:
        here = [self._adapters[name] for name in names if name in self._adapters]
        return Beneath(self.base_layer, here, args, kwargs)(x)

    # ---- the adapters ----

    @property
    def adapters(self) -> Mapping[str, LayerAdapter]:
        """The adapters on this layer by name."""
        return self._adapters

    def add(self, adapter: LayerAdapter) -> None:
        """Takes an adapter whose parts are in place."""
        self._adapters[adapter.name] = adapter

    def hold(self, attribute: str, name: str, part: nn.Module | nn.Parameter) -> None:
        """Lists a part of adapter `name` as `<attribute>.<name>`."""
        if attribute not in self._modules:
            self.add_module(attribute, ByAdapter())
        self.held(attribute)[name] = part

    def held(self, attribute: str) -> ByAdapter:
        """The parts that are listed under one attribute."""
        return self._modules[attribute]  # type: ignore[return-value]

    def delete(self, name: str) -> None:
        """Forgets adapter `name`, if this layer has it."""
        self._adapters.pop(name, None)
        for attribute, held in list(self._modules.items()):
            if isinstance(held, ByAdapter):
                held.delete(name)
                if not len(held):
                    del self._modules[attribute]

    # ---- which parameters stand in the base layer ----

    def stand(self, names: tuple[str, ...], *, merged: bool) -> None:
        """Makes `names` the adapters that compute, or puts the merged ones into the base layer's parameters."""
        self.lay_down()
        self.active = names
        for key, parameter in (self._merged if merged and self.merged else self._replaced_by(names)).items():
            self._put(key, parameter)

    def lay_down(self) -> None:
        """Gives the base layer the parameters back that others have been put in the place of."""
        for key, parameter in self._own.items():
            setattr(self.base_layer, key, parameter)
        self._own.clear()

    def own_parameter(self, key: str) -> nn.Parameter:
        """The base layer's own parameter, whatever stands in its place."""
        return self._own[key] if key in self._own else getattr(self.base_layer, key)

    def put_aside(self, key: str) -> nn.Parameter | None:
        """The base layer's own parameter if another stands in its place; None otherwise."""
        return self._own.get(key)

    def _put(self, key: str, parameter: nn.Parameter) -> None:
        self._own.setdefault(key, getattr(self.base_layer, key))
        setattr(self.base_layer, key, parameter)

    @torch.no_grad()
    def _replaced_by(self, names: Sequence[str]) -> dict[str, nn.Parameter]:
        """What stands in the place of base parameters for adapters `names`: less what each of them took out of one."""
        found: dict[str, list[nn.Parameter]] = {}
        for name in names:
            if name in self._adapters:
                for key, parameter in self._adapters[name].replaced().items():
                    found.setdefault(key, []).append(parameter)
        return {key: self._less(key, parameters) for key, parameters in found.items()}

    def _less(self, key: str, parameters: Sequence[nn.Parameter]) -> nn.Parameter:
        if len(parameters) == 1:
            return parameters[0]
        own = self.own_parameter(key)
        rest = own + sum((parameter - own for parameter in parameters), torch.zeros_like(own))
        return nn.Parameter(rest, requires_grad=False)

    @contextmanager
    def _with_parameters_of(self, names: Sequence[str]) -> Iterator[None]:
        try:
            for key, parameter in self._replaced_by(names).items():
                self._put(key, parameter)
            yield
        finally:
            self.lay_down()

    def aside(self) -> Iterator[nn.Parameter]:
        """The parameters that belong to the layer and are not listed among its own, for they do not stand there now."""
        yield from self._own.values()
        yield from self._merged.values()
        for adapter in self._adapters.values():
            yield from adapter.replaced().values()

    # ---- merging ----

    def check_merge(self, names: Sequence[str]) -> None:
        """Before anything is merged.

        Raises:
            MergeError: The base layer is quantized, or an adapter cannot become a part of it.
        """
        here = [self._adapters[name] for name in names if name in self._adapters]
        if here and is_quantized(self.base_layer):
            raise MergeError(
                "The base model is quantised, and rounding the merged weights to it again would change the answers: "
                "load the base model in 16 bits, attach the adapter, and merge there (`siliang merge` does)."
            )
        for adapter in here:
            adapter.check_merge()

    @torch.no_grad()
    def merge(self, names: Sequence[str], *, safe: bool = False) -> dict[str, nn.Parameter]:
        """The base layer's parameters with the adapters of `names` that this layer has in them, one after another.

        They are new ones, so that a parameter that is tied to another layer's leaves that one as it is. The base layer
        must have its own parameters, and has them again afterwards.

        Args:
            safe: Refuse where the result is not finite.

        Raises:
            MergeError: With `safe`, an adapter is broken; or the base layer lacks a parameter to merge into.
        """
        here = [name for name in names if name in self._adapters]
        weight = getattr(self.base_layer, "weight", None)  # not of experts, whose weights have names of their own
        found: dict[str, nn.Parameter] = {}
        with self._with_parameters_of(here):
            for name in here:
                for key, value in self._adapters[name].merged().items():
                    if getattr(self.base_layer, key) is None:
                        raise MergeError(f"Adapter {name!r} has a {key}, and the layer has none to merge it into.")
                    dtype = weight.dtype if isinstance(weight, Tensor) else self.own_parameter(key).dtype
                    # rounded once, at the end: the next adapter is merged in the wider dtype too
                    self._put(key, nn.Parameter(value, requires_grad=False))
                    found[key] = nn.Parameter(value.to(dtype), requires_grad=False)
                    if safe and not torch.isfinite(found[key]).all():
                        raise MergeError(f"Adapter {name!r} is broken: merged weights would not be finite.")
        return found

    def hold_merged(self, names: Sequence[str], parameters: dict[str, nn.Parameter]) -> None:
        """Takes what `merge` gave; `stand` puts it where the model reads it."""
        self.merged, self._merged = tuple(name for name in names if name in self._adapters), parameters

    # ---- what other modules read of a layer that they take for the plain one ----

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]


class Beneath:
    """What an adapter stands on: the base layer, or other adapters on it. Called with what the layer reads."""

    __slots__ = ("_adapters", "_args", "_base", "_kwargs")

    def __init__(self, base: nn.Module, adapters: Sequence[LayerAdapter], args: Any, kwargs: Any) -> None:
        self._base, self._adapters, self._args, self._kwargs = base, adapters, args, kwargs

    def __call__(self, x: Tensor) -> Tensor:
        if self.is_base:
            return self.computed_by(self._base, x)
        *rest, outermost = self._adapters
        return outermost.forward(x, Beneath(self._base, rest, self._args, self._kwargs))

    def computed_by(self, module: Callable[..., Tensor], x: Tensor) -> Tensor:
        """The output of what stands in the layer's place, which is given whatever else the layer is given."""
        return module(x, *self._args, **self._kwargs)

    @property
    def is_base(self) -> bool:
        """Whether it is the base layer alone."""
        return not self._adapters


class LayerAdapter(ABC):
    """One adapter on one layer: the method's equation.

    It is no module: its parts are listed in the layer, under PEFT's names, and read there each time, for moving and
    sharding a model may replace them.

    Args:
        layer: The layer that it is on.
        name: The adapter's.
        parts: Its modules and parameters, in the order of the file.
    """

    # Nothing else can be at work on the layer beside it.
    EXCLUSIVE: ClassVar[bool] = False

    def __init__(self, layer: AdaptedLayer, name: str, parts: Mapping[str, nn.Module | nn.Parameter]) -> None:
        self.layer, self.name = layer, name
        self._attributes: list[str] = []
        for attribute, part in parts.items():
            self.hold(attribute, part)

    def hold(self, attribute: str, part: nn.Module | nn.Parameter) -> None:
        """Adds a part, `<attribute>.<adapter>`."""
        self._attributes.append(attribute)
        self.layer.hold(attribute, self.name, part)

    def part(self, attribute: str) -> Any:
        """A part as it is now."""
        return self.layer.held(attribute)[self.name]

    @abstractmethod
    def forward(self, x: Tensor, beneath: Beneath) -> Tensor:
        """The layer's output.

        Args:
            x: What the layer reads.
            beneath: The layer without this adapter.
        """

    @abstractmethod
    def merged(self) -> dict[str, Tensor]:
        """What the base layer's parameters, as they stand there now, become with this adapter in them."""

    def check_merge(self) -> None:  # noqa: B027, most methods have nothing to check
        """
        Raises:
            MergeError: The adapter cannot become a part of the base layer's parameters.
        """

    def replaced(self) -> dict[str, nn.Parameter]:
        """Parameters that must stand in the place of the base layer's own while this adapter is at work."""
        return {}

    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters under their names in the file, such as `lora_A.weight`."""
        found: dict[str, nn.Parameter] = {}
        for attribute in self._attributes:
            part = self.part(attribute)
            if isinstance(part, nn.Parameter):
                found[attribute] = part
            else:
                found |= {f"{attribute}.{key}": p for key, p in part.named_parameters()}
        return found


class LayerSpec(ABC):
    """What an adapter will be on one layer: its config's values, resolved for that layer. Nothing has been made yet."""

    @abstractmethod
    def numbers(self, layer: nn.Module) -> int:
        """How many numbers `make` makes."""

    def sizes(self, layer: nn.Module) -> dict[str, int]:
        """The sizes that the config asks for by their fields, none of which is larger than the largest in a file."""
        return {}

    @abstractmethod
    def make(self, layer: AdaptedLayer, name: str, shared: SharedTensors) -> LayerAdapter:
        """Makes adapter `name` on a layer.

        Args:
            shared: The tensors that the adapter's layers share.
        """


class SharedTensors(Mapping[str, Tensor]):
    """The tensors that the layers of one adapter share, by name, as they are now: sharding a model replaces some."""

    def __init__(self, held: Mapping[str, ByAdapter], adapter: str) -> None:
        self._held, self._adapter = held, adapter

    def __getitem__(self, name: str) -> Tensor:
        return self._held[name][self._adapter]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


class ByAdapter(nn.Module):
    """Modules, parameters or buffers by the name of the adapter that they belong to: `lora_A.default.weight`."""

    def __setitem__(self, name: str, part: nn.Module | Tensor) -> None:
        self.delete(name)
        # not by add_module and its kin, which refuse the names of a module's own attributes
        if isinstance(part, nn.Module):
            self._modules[name] = part
        elif isinstance(part, nn.Parameter):
            self._parameters[name] = part
        else:
            self._buffers[name] = part

    def __getitem__(self, name: str) -> Any:
        if name in self._modules:
            return self._modules[name]
        return self._parameters[name] if name in self._parameters else self._buffers[name]

    def __contains__(self, name: str) -> bool:
        return any(name in held for held in self._all())

    def __len__(self) -> int:
        return sum(map(len, self._all()))

    def __iter__(self) -> Iterator[str]:
        return (name for held in self._all() for name in held)

    def delete(self, name: str) -> None:
        """Drops what adapter `name` has here, if anything."""
        for held in self._all():
            held.pop(name, None)

    def _all(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return self._modules, self._parameters, self._buffers


def trained_dtype(reference: Tensor) -> torch.dtype:
    """The dtype to train beside `reference`: fp32 beside half precision, where Adam's steps would vanish."""
    return torch.float32 if not reference.is_floating_point() or reference.itemsize < 4 else reference.dtype
