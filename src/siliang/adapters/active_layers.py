"""The adapters that are active in a model's layers: by the layers' own functions, `set_adapter` and `enable_adapters`,
they may be others than those of the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection

from siliang.adapters.adapted_layer import AdaptedLayer
from siliang.language import Bilingual
from siliang.types import ConfigError


def active_in(layers: Collection[AdaptedLayer], active: tuple[str, ...]) -> tuple[str, ...]:
    """The adapters that are active in each layer; `active` where there are no layers.

    Raises:
        ConfigError: The layers differ.
    """
    found = {layer.active for layer in layers}
    if len(found) > 1:
        raise ConfigError(
            Bilingual(
                "The layers have different active adapters, by their own set_adapter: call the model's set_adapter "
                "first, or name the adapters.",
                "各层用自己的 set_adapter 激活了不同的适配器：请先调用模型的 set_adapter，或写出适配器名。",
            )
        )
    return next(iter(found), active)


def active_before(layers: Collection[AdaptedLayer], active: tuple[str, ...]) -> tuple[str, ...]:
    """The adapters that will be active again after all layers have been disabled: those of each layer, or, where the
    layers differ, those of the model, with a warning.
    """
    found = {layer.active for layer in layers}
    if len(found) > 1 or len({layer.disabled for layer in layers}) > 1:
        message = Bilingual(
            "The layers differ in what is active or enabled: after this block all have the model's active adapters.",
            "各层激活或启用的适配器不同：此代码块结束后，各层都使用模型的激活适配器。",
        )
        warnings.warn(message, stacklevel=6)
    return found.pop() if len(found) == 1 else active
