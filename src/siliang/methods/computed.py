"""Adapters that compute a layer with other parameters: a function of the layer's own.

    y = layer(x; W' = f(W))

The module needs not be a linear layer: mixtures of experts hold the weights of all experts in one tensor (E, O, I),
which is not a module's `weight` (PEFT's `target_parameters`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from siliang.methods.layer import BaseForward, LayerAdapter
from siliang.models.introspect import as_stored
from siliang.models.quantized import float_weight, is_quantized


class ComputedParameters(LayerAdapter):
    """An adapter that is a function of its layer's parameters. A method writes `functions`; forward and merge follow.

    Where the output can be had without the whole of W', as LoRA's can, a method writes a `forward` of its own, which
    takes less memory. With another adapter W' would be a function of that one's weight too, so it is exclusive.
    """

    EXCLUSIVE: ClassVar[bool] = True

    @abstractmethod
    def functions(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """By a parameter's name, what it becomes: a function of it, through which gradients flow.

        A linear layer's weight is given as (O, I), dequantized, and half precision as fp32.
        """

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        return base_forward.through(WithParameters(self.layer.base_layer, self.functions()), x)

    def merged(self) -> dict[str, Tensor]:
        return computed_parameters(self.layer.base_layer, self.functions())


class WithParameters:
    """Calls `layer` with parameters that are functions of its own, which stay as they are."""

    def __init__(self, layer: nn.Module, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        self._layer, self._functions = layer, functions

    def __call__(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        layer, found = self._layer, computed_parameters(self._layer, self._functions)
        if is_quantized(layer):  # whose own forward takes nothing but its packed weight
            bias = found.get("bias", layer._parameters.get("bias"))
            return F.linear(x, found["weight"].to(x.dtype), None if bias is None else bias.to(x.dtype))
        own = {key: value.to(parameter_of(layer, key).dtype) for key, value in found.items()}
        return call_with(layer, own, x, *args, **kwargs)


def computed_parameters(layer: nn.Module, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> dict[str, Tensor]:
    """What `functions` make of the parameters of `layer`, as the layer stores them; in fp32 where those are half."""
    found: dict[str, Tensor] = {}
    for key, function in functions.items():
        own = parameter_of(layer, key)
        if key == "weight" and own.dim() == 2:
            weight = float_weight(layer)
            found[key] = as_stored(layer, function(weight.to(torch.promote_types(weight.dtype, torch.float32))))
        else:
            found[key] = function(own.to(torch.promote_types(own.dtype, torch.float32)))
    return found


def call_with(module: nn.Module, tensors: Mapping[str, Tensor], *args: object, **kwargs: object) -> Tensor:
    """Calls a module with other tensors for parameters of its own or of modules in it, which stay as they are."""
    places = {key: _place(module, key) for key in tensors}
    if not any(name in vars(owner) for owner, name in places.values()):
        return functional_call(module, dict(tensors), args, kwargs)
    # under FSDP1 the parameters are plain attributes too, views that the forward reads and functional_call does not set
    own = {key: parameter_of(module, key) for key in tensors}
    try:
        for key, (owner, name) in places.items():
            vars(owner)[name] = tensors[key]
        return module(*args, **kwargs)
    finally:
        for key, (owner, name) in places.items():
            vars(owner)[name] = own[key]


def parameter_of(module: nn.Module, key: str) -> Tensor:
    """A parameter by its dotted name, also where FSDP1 has made it a view."""
    owner, name = _place(module, key)
    found: Tensor = getattr(owner, name)
    return found


def _place(module: nn.Module, key: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and its name there."""
    path, _, name = key.rpartition(".")
    return module.get_submodule(path), name
