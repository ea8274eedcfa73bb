"""Makes libraries that check for PEFT's classes accept siliang's classes too.

transformers' Trainer loads the adapter of a checkpoint only into an instance of `peft.PeftModel`, and TRL's SFTTrainer
attaches only a `peft.PeftConfig`. PEFT's classes allow no virtual subclasses, and PEFT may not be installed.
So the few names in other modules that make these checks are replaced by ones that also know siliang's classes. For
every other object they return what they returned before.

`refresh` replaces the names in modules that are already imported, and imports none. It runs when a config or a model of
siliang is made, and when the Trainer or TRL checks one. The contract tests try all of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])
_MODEL, _CONFIG, _LAYER = (
    ("siliang.peft_api.model", "PeftModel"),
    ("siliang.methods.config", "PeftConfig"),
    ("siliang.adapters.adapted_layer", "AdaptedLayer"),
)


def refresh() -> None:
    """Replaces the names in the imported modules of `_REPLACED`, unless they are replaced already."""
    for module, names in _REPLACED.items():
        attributes = vars(sys.modules[module]) if module in sys.modules else {}
        for name, replacement in names.items():
            if name in attributes and not _is_ours(attributes[name]):
                setattr(sys.modules[module], name, replacement(attributes[name]))


def _is_ours(value: object) -> bool:
    return isinstance(value, tuple) or hasattr(value, "knows_siliang")


def _ours(kind: tuple[str, str]) -> type | tuple[()]:
    """A class of siliang, for isinstance; () if its file is not imported, since no instance of it can exist."""
    module, name = kind
    return getattr(sys.modules.get(module), name, ())


def _also(kind: tuple[str, str]) -> Callable[[object], object]:
    """For a class that is an argument of isinstance: that class and siliang's."""

    def both(theirs: object) -> object:
        ours = _ours(kind)
        return (theirs, ours) if ours else theirs  # not imported yet: a later `refresh` does it

    return both


def _marked(function: F) -> F:
    vars(function)["knows_siliang"] = True
    return function


def _or_our_model(theirs: Callable[..., bool]) -> Callable[..., bool]:
    """For a function that returns whether a model has adapters of PEFT."""

    @wraps(theirs)
    def is_peft_model(model: object) -> bool:
        from accelerate.utils import extract_model_from_parallel

        if isinstance(extract_model_from_parallel(model), _ours(_MODEL)):
            refresh()  # the caller's next check may be in a module that was imported after the model was made
            return True
        return theirs(model)

    return _marked(is_peft_model)


def _or_our_attaching(theirs: Callable[..., object]) -> Callable[..., object]:
    """For `peft.get_peft_model`: siliang's function if the config is siliang's."""

    @wraps(theirs)
    def get_peft_model(model: object, peft_config: object, *args: object, **kwargs: object) -> object:
        if isinstance(peft_config, _ours(_CONFIG)):
            return import_module("siliang.peft_api.for_tasks").get_peft_model(model, peft_config, *args, **kwargs)
        return theirs(model, peft_config, *args, **kwargs)

    return _marked(get_peft_model)


_REPLACED: dict[str, dict[str, Callable[..., object]]] = {
    "transformers.trainer_utils": {"_is_peft_model": _or_our_model},
    "transformers.trainer": {"_is_peft_model": _or_our_model},
    "transformers.integrations.neftune": {"_is_peft_model": _or_our_model},
    "accelerate.utils.modeling": {"is_peft_model": _or_our_model},
    "accelerate.utils": {"is_peft_model": _or_our_model},
    "trl.trainer.base_trainer": {"is_peft_model": _or_our_model},
    "trl.trainer.sft_trainer": {
        "is_peft_model": _or_our_model,
        "PeftConfig": _also(_CONFIG),
        "get_peft_model": _or_our_attaching,
        "BaseTunerLayer": _also(_LAYER),
    },
}
