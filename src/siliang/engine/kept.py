"""An engine that is kept with its model for further calls: its trial takes longer than the forward pass of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch import Tensor, nn

from siliang.adapters.adapted_layer import AdaptedLayer
from siliang.adapters.modules_to_save import ModulesToSaveWrapper
from siliang.engine.step import Engine
from siliang.ops.stored import as_kept
from siliang.peft_api.model import PeftModel


@dataclass
class _Kept:
    engine: Engine
    state: tuple[object, ...]
    parts: Sequence[ref[object]]  # what the state has the numbers of, which another object has after its end
    users: int = 0


class KeptEngine:
    """Keeps the engine of the last call. Its hooks are in the model only while it is in use.

    The next call makes another one if anything has changed that a trial may depend on (`state_of`), or the settings.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    @contextmanager
    def of(self, model: nn.Module, settings: object, make: Callable[[], Engine]) -> Iterator[Engine]:
        """Within the block the engine is ready to use.

        Args:
            settings: What it is made of besides the model: values that can be compared.
            make: Makes it.
        """
        if self._kept is not None:
            self._kept.engine.detach()  # another block may be open, whose hooks are not the model's own
        state = (settings, *state_of(model))
        if self._kept is None or self._kept.state != state or any(part() is None for part in self._kept.parts):
            self._kept = _Kept(make(), state, [ref(part) for part in _parts_of(model)])
        kept = self._kept
        kept.engine.attach()
        kept.users += 1
        try:
            yield kept.engine
        finally:
            kept.users -= 1
            if not kept.users:
                kept.engine.detach()
            if kept.engine.reference_store is not None and self._kept is kept:  # it holds values of this call's rows
                self._kept = None


def state_of(model: nn.Module) -> tuple[object, ...]:
    """What a trial may depend on in a model: its modules and whatever is hooked into them, its weights, which adapters
    compute, its config. Equal states are of the same objects."""
    modules: list[object] = []
    tensors: list[object] = []
    for module in model.modules():
        own = vars(module)
        hooks = (*module._forward_pre_hooks, *module._forward_hooks)
        modules.append((id(module), own.get("forward"), hooks, _adapters(module)))
        tensors += [_state(x) for part in (module._parameters, module._buffers) for x in part.values() if x is not None]
    config: Any = getattr(model, "config", None)
    settings = (config.to_json_string(use_diff=False), config._attn_implementation) if config is not None else None
    return id(model), modules, tensors, settings


def _parts_of(model: nn.Module) -> Iterator[object]:
    """The modules of a model and their tensors."""
    for module in model.modules():
        yield module
        yield from (x for part in (module._parameters, module._buffers) for x in part.values() if x is not None)


def _adapters(module: nn.Module) -> object:
    """Which adapters compute in a module."""
    if isinstance(module, AdaptedLayer):
        return module.active, module.disabled, module.merged, id(module.rows)
    if isinstance(module, ModulesToSaveWrapper):
        return module.active
    if isinstance(module, PeftModel):
        injection = module.injection
        return injection.active, injection.merged, injection.is_disabled
    return None


def _state(x: Tensor) -> tuple[object, ...]:
    x = as_kept(x)
    version = None if x.is_inference() else x._version
    return id(x), version, x.data_ptr(), x.dtype, x.device, x.requires_grad
