"""What a method writes for a layer of the base model: `LayerAdapter`, its equation.

An adapter on a layer is a function of the layer's input and of the layer without this adapter, which is the base
layer, or the base layer with other adapters. The last active adapter is the outermost:

    y = adapter_k(x, adapter_k-1( ... base layer))

Merging applies the adapters in the same order, each to the weight that the ones before it have left. The module that
carries the adapters of a layer is AdaptedLayer (siliang.adapters.adapted_layer).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class LayerAdapter(ABC):
    """One adapter on one layer: the method's equation.

    It is not a module. Its parts (modules and parameters) are registered on the layer, under PEFT's names, and are read
    there each time, because moving or sharding a model may replace them.

    Args:
        layer: The layer that it is on.
        name: The adapter's name.
        parts: Its modules, parameters and buffers (tensors that are saved and not trained), in the order of the file.

    Attributes:
        s: The scaling that it computes with now, which scripts may change.
        config_scaling: The scaling that follows from its config.
        has_scaling: Its method has a scaling.
        method: Its method's name, such as LORA.
        settings: The settings that PEFT shows of a layer with it, such as {"r": 8}.
        shared: The tensors that it shares with the other layers, by the names that PEFT shows of a layer with it.
    """

    # No other adapter can be active on the layer together with it.
    EXCLUSIVE: ClassVar[bool] = False
    # It can compute on some rows of a batch while others have other adapters.
    PART_OF_A_BATCH: ClassVar[bool] = True
    # Those of its own class can all the same.
    WITH_ITS_KIND: ClassVar[bool] = False
    # Why what it computes for a token depends on later ones; None if it does not.
    LOOKS_AHEAD: ClassVar[str | None] = None
    # Why it needs all tokens of a text, also those that nothing reads behind the last layer; None if it does not.
    NEEDS_ALL_TOKENS: ClassVar[str | None] = None

    s: float = 1.0
    config_scaling: float = 1.0
    has_scaling: bool = False
    method: str = ""
    settings: Mapping[str, object] = MappingProxyType({})
    shared: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(self, layer: Layer, name: str, parts: Mapping[str, nn.Module | Tensor]) -> None:
        self.layer, self.name = layer, name
        self._attributes: list[str] = []
        for attribute, part in parts.items():
            self.add_part(attribute, part)

    def add_part(self, attribute: str, part: nn.Module | Tensor) -> None:
        """Registers a part on the layer, as `<attribute>.<adapter>`."""
        self._attributes.append(attribute)
        self.layer.add_part(attribute, self.name, part)

    def share_part(self, attribute: str, other: LayerAdapter) -> None:
        """Makes a part the one that the same adapter has on another layer."""
        self.layer.add_part(attribute, self.name, other.layer.part(attribute, other.name))

    def add_buffer(self, attribute: str, tensor: Tensor) -> None:
        """Registers a tensor that follows from the base layer and the config, so that no file needs to hold it."""
        self.layer.add_part(attribute, self.name, tensor, saved=False)

    def part(self, attribute: str) -> Tensor:
        """The parameter or buffer of this name, as it is now."""
        found = self.layer.part(attribute, self.name)
        assert isinstance(found, Tensor)
        return found

    def module(self, attribute: str, kind: type[M]) -> M:
        """The module of this name, which is a `kind`."""
        found = self.layer.part(attribute, self.name)
        assert isinstance(found, kind)
        return found

    def set_scaling(self, s: float) -> None:
        """Makes `s` the scaling that follows from the config."""
        self.s = self.config_scaling = s
        self.has_scaling = True

    @abstractmethod
    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        """The layer's output.

        Args:
            x: The layer's input.
            base_forward: The layer without this adapter.
        """

    @abstractmethod
    def merged(self) -> dict[str, Tensor]:
        """The base layer's parameters, as they are now, with this adapter merged into them, by name."""

    def delta_weight(self) -> Tensor:
        """What merging adds to the layer's weight, in the form in which that is stored."""
        merged = self.merged()["weight"]
        return merged - self.layer.base_layer.weight.to(merged.dtype)

    def check_merge(self) -> None:  # noqa: B027, most methods have nothing to check
        """
        Raises:
            MergeError: The adapter cannot be merged into the base layer's parameters.
        """

    def check_values(self, tensors: Mapping[str, Tensor], where: str) -> None:  # noqa: B027, most take any values
        """
        Args:
            tensors: What a file holds for this adapter, of the right shapes, by the names of `tensors`.
            where: The file and the layer, for the error.

        Raises:
            AdapterError: The adapter cannot have these values.
        """

    def overrides(self) -> dict[str, nn.Parameter]:
        """Frozen parameters that replace those of the base layer while this adapter is active, by name."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's parameters and buffers by their names in the file, such as `lora_A.weight`."""
        found: dict[str, Tensor] = {}
        for attribute in self._attributes:
            part = self.layer.part(attribute, self.name)
            if isinstance(part, Tensor):
                found[attribute] = part
            else:
                found |= {f"{attribute}.{key}": t for key, t in part.state_dict(keep_vars=True).items()}
        return found

    def parameters(self) -> dict[str, nn.Parameter]:
        """What of `tensors` is trained."""
        return {key: t for key, t in self.tensors().items() if isinstance(t, nn.Parameter)}


class BaseForward:
    """The layer without the adapter that this is passed to: the base layer, or the base layer with other adapters.

    Args:
        base_layer: The base layer.
        inner: The other adapters, the innermost first.
        args, kwargs: The layer's other arguments.
    """

    __slots__ = ("_args", "_inner", "_kwargs", "base_layer")

    def __init__(
        self,
        base_layer: nn.Module,
        inner: Sequence[LayerAdapter],
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
    ) -> None:
        self.base_layer, self._inner, self._args, self._kwargs = base_layer, inner, args, kwargs

    def __call__(self, x: Tensor) -> Tensor:
        if self.is_base_layer:
            return self.through(self.base_layer, x)
        *rest, outermost = self._inner
        return outermost.forward(x, BaseForward(self.base_layer, rest, self._args, self._kwargs))

    def through(self, module: Callable[..., Tensor], x: Tensor) -> Tensor:
        """The output of another module in the layer's place, called with all arguments of the layer."""
        return module(x, *self._args, **self._kwargs)

    @property
    def inner(self) -> Sequence[LayerAdapter]:
        """The other adapters, the innermost first."""
        return self._inner

    def named(self, name: str) -> object:
        """What the layer was called with under a name, other than its input; None for nothing."""
        return self._kwargs.get(name)

    @property
    def is_base_layer(self) -> bool:
        """Whether it is the base layer alone."""
        return not self._inner


class Layer(Protocol):
    """The layer of the base model that an adapter is on, as the adapter sees it (AdaptedLayer)."""

    base_layer: Any  # nn.Linear or a quantized one, nn.Embedding, a norm, a module of experts ...
    training: bool
    routed: bool  # it may read any tokens of the batch, in any order: `is_routed`

    @property
    def adapters(self) -> Mapping[str, LayerAdapter]:
        """The adapters on the layer by name."""
        ...

    def add_part(self, attribute: str, adapter: str, part: nn.Module | Tensor, *, saved: bool = True) -> None:
        """Registers a part of an adapter, as `<attribute>.<adapter>`.

        Args:
            saved: A state dict has it. Of tensors that are not trained.
        """

    def part(self, attribute: str, adapter: str) -> nn.Module | Tensor:
        """The part of an adapter, as it is now."""
        ...

    def base_parameter(self, key: str) -> nn.Parameter:
        """The base layer's own parameter, also while another replaces it."""
        ...


# Makes an adapter on a layer from the layer, the adapter's name and the tensors that the adapter's layers share. It is
# also called with a layer on the meta device, to find out how large the adapter would be.
MakeAdapter: TypeAlias = Callable[[Layer, str, Mapping[str, Tensor]], LayerAdapter]


class Weight(nn.Module):
    """A parameter that the file calls `<part>.weight`."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start)


def trained_dtype(reference: Tensor) -> torch.dtype:
    """The dtype to train with a base parameter: fp32 where that is in half precision, in which Adam's steps would
    vanish.
    """
    return torch.float32 if not reference.is_floating_point() or reference.itemsize < 4 else reference.dtype


def new_parameter(layer: Layer, *shape: int, start: Callable[[Tensor], object] = nn.init.zeros_) -> nn.Parameter:
    """A new parameter of an adapter on a layer: on its weight's device, in the dtype that is trained there.

    Args:
        start: Fills it.
    """
    weight = getattr(layer.base_layer, "weight", None)
    weight = next(layer.base_layer.parameters()) if weight is None else weight  # of an attention that of a projection
    values = torch.empty(shape, device=weight.device, dtype=trained_dtype(weight))
    start(values)
    return nn.Parameter(values)


def kaiming(values: Tensor) -> None:
    """Fills a tensor at random, as nn.Linear fills its weight."""
    nn.init.kaiming_uniform_(values, a=math.sqrt(5))
