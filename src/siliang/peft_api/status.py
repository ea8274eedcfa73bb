"""What adapters a model has, layer by layer and as a whole: `get_layer_status`, `get_model_status`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from siliang.adapters.adapted_layer import AdaptedLayer, ByAdapter
from siliang.adapters.modules_to_save import ModulesToSaveWrapper
from siliang.adapters.table_rows import RowsAdapter
from siliang.language import Bilingual
from siliang.methods.lora_parameters import LoraParameters
from siliang.models.introspect import is_linear
from siliang.models.quantized import count_parameters
from siliang.peft_api.answers_as_base import AnswersAsBase
from siliang.types import ConfigError, KindError

Irregular = Literal["irregular"]
T = TypeVar("T")


@dataclass
class TunerLayerStatus:
    """A layer with adapters.

    Attributes:
        name: Its path in the model.
        module_type: The method and the kind of the layer, such as "lora.Linear".
        enabled: Its adapters compute.
        active_adapters: The active ones.
        merged_adapters: Those in the base layer's weights.
        requires_grad: By adapter: whether it is trained; "irregular" where a part of it is.
        available_adapters: All of them.
        devices: By adapter: the kinds of device that it is on.
        quantization_backend: What holds the base layer's weight, such as "bnb 4bit"; None where it is not quantized.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """A model with adapters. "irregular": its layers differ in this.

    Attributes:
        base_model_type: The base model's class.
        adapter_model_type: What carries the adapters, such as "LoraModel"; "None" for a model without PeftModel.
        peft_types: The method of each adapter.
        trainable_params: Trained parameters.
        total_params: All of them.
        num_adapter_layers: Layers with adapters.
        enabled, active_adapters, merged_adapters, requires_grad, available_adapters, devices, quantization_backend: As
            of a layer.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The layers with adapters, and the modules that are saved whole.

    Raises:
        ConfigError: There are none.
        KindError: The adapters are prompts, which are in no layer.
    """
    is_peft = isinstance(model, AnswersAsBase)
    if is_peft and model.injection.for_prompts:
        raise KindError(
            Bilingual(
                "The model's adapters are prompts, which are in no layer: there is no status of layers.",
                "该模型的适配器是提示，不在任何一层中：没有逐层的状态。",
            )
        )
    holder: nn.Module = model.base_model if is_peft else model
    found = [
        _layer_status(name, module)
        for name, module in holder.named_modules()
        if isinstance(module, AdaptedLayer | ModulesToSaveWrapper)
    ]
    if not found:
        raise ConfigError(
            Bilingual(
                "The model has no layers with adapters: get_peft_model puts them there.",
                "模型没有带适配器的层：请用 get_peft_model 接上适配器。",
            )
        )
    return found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The model as a whole.

    Raises:
        ConfigError: It has no layers with adapters.
    """
    layers = get_layer_status(model)
    is_peft = isinstance(model, AnswersAsBase)
    base = model.get_base_model() if is_peft else model
    parameters, total = count_parameters(model)
    merged = {name for layer in layers for name in layer.merged_adapters}
    somewhere = any(merged & (set(layer.available_adapters) - set(layer.merged_adapters)) for layer in layers)
    trained: dict[str, list[bool | Irregular]] = {}
    for layer in layers:
        for name, value in layer.requires_grad.items():
            trained.setdefault(name, []).append(value)
    return TunerModelStatus(
        base_model_type=type(base).__name__ if is_peft or isinstance(base, PreTrainedModel) else "other",
        adapter_model_type=type(model.base_model).__name__ if is_peft else "None",
        peft_types={name: str(c.peft_type) for name, c in model.peft_config.items()} if is_peft else {},
        trainable_params=parameters,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_same(layer.enabled for layer in layers),
        active_adapters=_same(layer.active_adapters for layer in layers),
        merged_adapters="irregular" if somewhere else sorted(merged),
        requires_grad={name: _same(trained[name]) for name in sorted(trained)},
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices={
            name: sorted({d for layer in layers for d in layer.devices.get(name, [])})
            for name in sorted({name for layer in layers for name in layer.devices})
        },
        quantization_backend=_same(layer.quantization_backend for layer in layers),
    )


def _layer_status(name: str, module: AdaptedLayer | ModulesToSaveWrapper) -> TunerLayerStatus:
    tensors = _tensors(module)
    saved = isinstance(module, ModulesToSaveWrapper)
    rows = None if saved else next((one for one in module.adapters.values() if isinstance(one, RowsAdapter)), None)
    return TunerLayerStatus(
        name=name if rows is None or rows.is_the_method else f"{name}.token_adapter",  # a module of its own in PEFT
        module_type=type(module).__name__ if saved else _module_type(module),
        enabled=not module.disable_adapters,
        active_adapters=module.active_adapters,
        merged_adapters=module.merged_adapters,
        requires_grad={key: _trained(of) for key, of in tensors.items()},
        available_adapters=sorted(tensors),
        devices={key: sorted({t.device.type for t in of}) for key, of in tensors.items()},
        quantization_backend=None if saved else _backend(module.base_layer),
    )


def _module_type(module: AdaptedLayer) -> str:
    """The first adapter's method, and the kind of layer, as PEFT calls its class for both."""
    adapter = next(iter(module.adapters.values()))
    base = module.base_layer
    if isinstance(adapter, RowsAdapter):
        return "TrainableTokensLayer"
    kind = "Linear" if is_linear(base) and _backend(base) is None else type(base).__name__
    return f"{adapter.method.lower()}.{'ParamWrapper' if isinstance(adapter, LoraParameters) else kind}"


def _tensors(module: AdaptedLayer | ModulesToSaveWrapper) -> dict[str, list[Tensor]]:
    """What each adapter has here."""
    found: dict[str, list[Tensor]] = {}
    if isinstance(module, ModulesToSaveWrapper):
        return {name: list(copied.parameters()) for name, copied in module.modules_to_save.items()}
    for held in module.children():
        if isinstance(held, ByAdapter):
            for name in held:
                part = held[name]
                found.setdefault(name, []).extend([part] if isinstance(part, Tensor) else part.parameters())
    return found


def _trained(tensors: list[Tensor]) -> bool | Irregular:
    """Whether an adapter's parameters here are trained."""
    return _same(t.requires_grad for t in tensors if isinstance(t, nn.Parameter))


def _backend(layer: nn.Module) -> str | None:
    kind = type(layer).__name__
    return {"Linear4bit": "bnb 4bit", "Linear8bitLt": "bnb 8bit"}.get(kind)


def _same(values: Iterable[T | Irregular]) -> T | Irregular:
    """What all values are."""
    found = list(values)
    return found[0] if all(value == found[0] for value in found) else "irregular"
