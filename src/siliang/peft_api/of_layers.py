"""The layers of adapters: which they are by name, and whether they can become LoRA."""

from __future__ import annotations

from siliang.adapters.adapted_layer import AdaptedLayer
from siliang.adapters.injection import Injection
from siliang.adapters.table_rows import RowsAdapter
from siliang.language import Bilingual
from siliang.methods.layer import LayerAdapter
from siliang.methods.lora_parameters import LoraParameters
from siliang.models.introspect import is_linear
from siliang.types import KindError, MergeError


def targeted_modules(injection: Injection) -> list[str]:
    """The paths of the layers that adapters tune: without those of which they tune a parameter by its name, and without
    the tables of which they have rows beside another method.
    """
    own = [path for path, one in _layers(injection) if not isinstance(one, LoraParameters) and not _is_beside(one)]
    return list(dict.fromkeys(own))


def targeted_parameters(injection: Injection) -> list[str]:
    """The paths of the parameters that LoRA's target_parameters names."""
    found = [(path, one) for path, one in _layers(injection) if isinstance(one, LoraParameters)]
    return list(dict.fromkeys(f"{path}.{key}" for path, one in found for key in one.parameter_names))


def _layers(injection: Injection) -> list[tuple[str, LayerAdapter]]:
    return [pair for adapter in injection.adapters.values() for pair in adapter.layers.items()]


def _is_beside(layer: LayerAdapter) -> bool:
    return isinstance(layer, RowsAdapter) and not layer.is_the_method


def convertible_layers(injection: Injection, name: str) -> dict[str, AdaptedLayer]:
    """The layers of an adapter by path.

    Raises:
        KindError: The adapter changes something else than weights of linear layers.
    """
    adapter = injection.adapters[name]
    if adapter.prompt is not None or adapter.parts.parameters or adapter.parts.table_rows or not adapter.layers:
        raise KindError(
            Bilingual(
                f"Adapter {name!r} ({adapter.config.peft_type}) changes more than linear weights.",
                f"适配器 {name!r}（{adapter.config.peft_type}）改变的不只是线性层的权重。",
            )
        )
    layers = {path: injection.attachments.layers[path] for path in adapter.layers}
    for path, layer in layers.items():
        adapter.layers[path].check_merge()
        if not is_linear(layer.base_layer) or adapter.layers[path].merged().keys() != {"weight"}:
            raise KindError(
                Bilingual(
                    f"Adapter {name!r} changes more than the weight of a linear layer at {path}.",
                    f"适配器 {name!r} 在 {path} 改变的不只是线性层的权重。",
                )
            )
    return layers


def is_convertible(injection: Injection, name: str) -> bool:
    """Whether an adapter can become LoRA."""
    try:
        return bool(convertible_layers(injection, name))
    except (KindError, MergeError):
        return False
