"""A layer of the base model with adapters on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from siliang.adapters.peft_layer import PeftLayer
from siliang.language import Bilingual
from siliang.methods.adapter_names import AdapterNames, by_row
from siliang.methods.layer import BaseForward, LayerAdapter
from siliang.models.introspect import parameters_of
from siliang.models.quantized import is_quantized
from siliang.types import MergeError


class AdaptedLayer(PeftLayer):
    """A layer of the base model with named adapters on it, of one method or of several.

    It takes the base layer's place in the model and keeps it as `base_layer`. Nothing here depends on its kind, so
    the same class serves full-precision and quantized layers. The parts of the adapters are registered under PEFT's
    names, such as `lora_A.<adapter>`. Adapters are made while the base layer has its own parameters.

    Attributes:
        active: The active adapters, the innermost first.
        disabled: None computes.
        merged: Those that are in the base layer's own parameters; the layer computes with these alone then, as in PEFT.
        rows: For a batch that mixes adapters, the one of each row; None otherwise.
        routed: It may read any tokens of the batch, in any order (`is_routed`).
    """

    def __init__(self, base_layer: nn.Module, *, routed: bool = False) -> None:
        super().__init__()
        self.base_layer, self.routed = base_layer, routed
        self.active: tuple[str, ...] = ()
        self.disabled = False
        self.merged: tuple[str, ...] = ()
        self.rows: AdapterNames | None = None
        # Dicts, so that nothing in them is listed a second time among the layer's parameters.
        self._adapters: dict[str, LayerAdapter] = {}
        self._replaced: dict[str, nn.Parameter] = {}  # the base layer's own parameters that others replace now
        self._merged: dict[str, nn.Parameter] = {}

    def forward(self, x: Tensor | None = None, *args: object, **kwargs: object) -> Tensor:
        if x is None:  # an attention's input has a name
            named = kwargs.pop(next(iter(parameters_of(self.base_layer))))
            assert isinstance(named, Tensor)
            x = named
        if self.rows is None:
            return self._compute(() if self.disabled or self.merged else self.active, x, args, kwargs)

        def run(name: str, part: Tensor, *args: object, **kwargs: object) -> Tensor:
            with self._with_overrides_of([name]):
                return self._compute([name], part, args, kwargs)

        return by_row(self.rows, (x, *args), kwargs, run, where="a layer with adapters", routed=self.routed)

    def _compute(
        self, names: Sequence[str], x: Tensor, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> Tensor:
        here = [self._adapters[name] for name in names if name in self._adapters]
        return BaseForward(self.base_layer, here, args, kwargs)(x)

    # ---- the adapters ----

    @property
    def adapters(self) -> Mapping[str, LayerAdapter]:
        """The adapters on this layer by name."""
        return self._adapters

    def add_adapter(self, adapter: LayerAdapter) -> None:
        """Adds an adapter whose parts are registered."""
        self._adapters[adapter.name] = adapter

    def delete_adapter(self, name: str) -> None:
        """Removes adapter `name`, if this layer has it."""
        self._adapters.pop(name, None)
        delete_parts(self, name)

    def add_part(self, attribute: str, adapter: str, part: nn.Module | Tensor, *, saved: bool = True) -> None:
        """Registers a part of an adapter, as `<attribute>.<adapter>`.

        Args:
            saved: A state dict has it. Of tensors that are not trained.
        """
        if attribute not in self._modules:
            self.add_module(attribute, ByAdapter())
        held = parts_of(self, attribute)
        held[adapter] = part
        if not saved:
            held.leave_out(adapter)

    def part(self, attribute: str, adapter: str) -> nn.Module | Tensor:
        """The part of an adapter, as it is now."""
        return parts_of(self, attribute)[adapter]

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """The attributes that hold parts of adapters, such as "lora_A"."""
        held = {name: one for name, one in self.named_children() if isinstance(one, ByAdapter)}
        return tuple(name for name, one in held.items() if next(one.parameters(), None) is not None)

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """The attributes that hold settings of adapters, such as "r"."""
        settings = {name for adapter in self._adapters.values() for name in adapter.settings}
        return (*sorted(settings), *(["scaling"] if self.scaling else []))

    # ---- this layer alone, until the model's own functions set all layers again ----

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes adapters the active ones of this layer, and trained; the others of it are frozen.

        Args:
            inference_mode: Freeze these too.
        """
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        self.activate(names, disabled=self.disabled)
        self.set_requires_grad(list(self._adapters), False)
        self.set_requires_grad(names, not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Lets this layer compute with its adapters, or without; they are frozen meanwhile, as in PEFT."""
        self.activate(self.active, disabled=not enabled)
        self.set_requires_grad(self.active if enabled else list(self._adapters), enabled)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Trains the parts that adapters have on this layer, or freezes them."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self._adapters:
                for p in self._adapters[name].parameters().values():
                    p.requires_grad_(requires_grad)

    # ---- which parameters the base layer has ----

    def activate(self, names: tuple[str, ...], *, disabled: bool) -> None:
        """Makes `names` the active adapters; they compute, or the merged ones do, unless all are disabled."""
        self.restore_base()
        self.active, self.disabled = names, disabled
        if disabled:
            return
        for key, parameter in (self._merged if self.merged else self._overrides_of(names)).items():
            self._replace(key, parameter)

    def restore_base(self) -> None:
        """Gives the base layer its own parameters back."""
        for key, parameter in self._replaced.items():
            setattr(self.base_layer, key, parameter)
        self._replaced.clear()

    def base_parameter(self, key: str) -> nn.Parameter:
        """The base layer's own parameter, also while another replaces it."""
        return self._replaced[key] if key in self._replaced else getattr(self.base_layer, key)

    def _replace(self, key: str, parameter: nn.Parameter) -> None:
        self._replaced.setdefault(key, getattr(self.base_layer, key))
        setattr(self.base_layer, key, parameter)

    @torch.no_grad()
    def _overrides_of(self, names: Sequence[str]) -> dict[str, nn.Parameter]:
        """What replaces the base parameters for adapters `names`: less what each of them took out of one."""
        found: dict[str, list[nn.Parameter]] = {}
        for name in names:
            if name in self._adapters:
                for key, parameter in self._adapters[name].overrides().items():
                    found.setdefault(key, []).append(parameter)
        return {key: self._combined(key, parameters) for key, parameters in found.items()}

    def _combined(self, key: str, parameters: Sequence[nn.Parameter]) -> nn.Parameter:
        if len(parameters) == 1:
            return parameters[0]
        own = self.base_parameter(key)
        rest = own + sum((parameter - own for parameter in parameters), torch.zeros_like(own))
        return nn.Parameter(rest, requires_grad=False)

    @contextmanager
    def _with_overrides_of(self, names: Sequence[str]) -> Iterator[None]:
        try:
            for key, parameter in self._overrides_of(names).items():
                self._replace(key, parameter)
            yield
        finally:
            self.restore_base()

    def parked_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that belong to the layer and are not registered in it now, because others replace them."""
        yield from self._replaced.values()
        yield from self._merged.values()
        for adapter in self._adapters.values():
            yield from adapter.overrides().values()

    # ---- merging ----

    def check_merge(self, names: Sequence[str]) -> None:
        """Before anything is merged.

        Raises:
            MergeError: The base layer is quantized, or an adapter cannot become a part of it.
        """
        here = [self._adapters[name] for name in names if name in self._adapters]
        if here and is_quantized(self.base_layer):
            raise MergeError(
                Bilingual(
                    "The base model is quantized, and rounding the merged weights to it again would change "
                    "the answers: "
                    "load the base model in 16 bits, attach the adapter, and merge there (`siliang merge` does).",
                    "基座模型已量化，合并后的权重再次取整会改变输出：请以 16 位加载基座模型，"
                    "接上适配器后再合并（`siliang merge` 就是这样做的）。",
                )
            )
        for adapter in here:
            adapter.check_merge()

    @contextmanager
    def in_evaluation(self) -> Iterator[None]:
        """Within the block nothing of the adapters is dropped at random."""
        training, self.training = self.training, False
        try:
            yield
        finally:
            self.training = training

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
        with self._with_overrides_of(here):
            for name in here:
                with self.in_evaluation():
                    values = self._adapters[name].merged()
                for key, value in values.items():
                    if getattr(self.base_layer, key) is None:
                        raise MergeError(
                            Bilingual(
                                f"Adapter {name!r} has a {key}, and the layer has none to merge it into.",
                                f"适配器 {name!r} 有 {key}，而该层没有可合并的位置。",
                            )
                        )
                    dtype = weight.dtype if isinstance(weight, Tensor) else self.base_parameter(key).dtype
                    # rounded once, at the end: the next adapter is merged in the wider dtype too
                    self._replace(key, nn.Parameter(value, requires_grad=False))
                    found[key] = nn.Parameter(value.to(dtype), requires_grad=False)
                    if safe and not torch.isfinite(found[key]).all():
                        raise MergeError(
                            Bilingual(
                                f"Adapter {name!r} is broken: merged weights would not be finite.",
                                f"适配器 {name!r} 已损坏：合并后的权重会出现非有限值。",
                            )
                        )
        return found

    def set_merged(self, names: Sequence[str], parameters: dict[str, nn.Parameter]) -> None:
        """Keeps what `merge` gave, for `activate`."""
        self.merged, self._merged = tuple(name for name in names if name in self._adapters), parameters


class ByAdapter(nn.Module):
    """Modules, parameters or buffers by the name of the adapter that they belong to: `lora_A.default.weight`."""

    def __setitem__(self, name: str, part: nn.Module | Tensor) -> None:
        self.delete(name)
        # not by add_module and register_parameter, which refuse the names of a module's own attributes
        if isinstance(part, nn.Module):
            self._modules[name] = part
        elif isinstance(part, nn.Parameter):
            self._parameters[name] = part
        else:
            self._buffers[name] = part

    def leave_out(self, name: str) -> None:
        """Keeps a buffer out of the state dict."""
        self._non_persistent_buffers_set.add(name)

    def __getitem__(self, name: str) -> nn.Module | Tensor:
        for held in self._all():
            if (found := held.get(name)) is not None:
                return found
        raise KeyError(name)

    def __contains__(self, name: str) -> bool:
        return any(name in held for held in self._all())

    def __len__(self) -> int:
        return sum(map(len, self._all()))

    def __iter__(self) -> Iterator[str]:
        return (name for held in self._all() for name in held)

    def keys(self) -> list[str]:
        """The adapters that have a part here."""
        return list(self)

    def values(self) -> list[nn.Module | Tensor]:
        """Their parts."""
        return [self[name] for name in self]

    def items(self) -> list[tuple[str, nn.Module | Tensor]]:
        """Both."""
        return [(name, self[name]) for name in self]

    def delete(self, name: str) -> None:
        """Drops what adapter `name` has here, if anything."""
        self._non_persistent_buffers_set.discard(name)
        for held in self._all():
            held.pop(name, None)

    def _all(self) -> tuple[dict[str, nn.Module | None], dict[str, nn.Parameter | None], dict[str, Tensor | None]]:
        return self._modules, self._parameters, self._buffers


def parts_of(module: nn.Module, attribute: str) -> ByAdapter:
    """The parts of adapters that `module` holds under one attribute."""
    found = module._modules[attribute]
    assert isinstance(found, ByAdapter)
    return found


def delete_parts(module: nn.Module, name: str) -> None:
    """Removes all parts of adapter `name` from `module`."""
    for attribute, held in list(module.named_children()):
        if isinstance(held, ByAdapter):
            held.delete(name)
            if not len(held):
                delattr(module, attribute)
