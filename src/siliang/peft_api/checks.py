"""What is checked before an adapter is attached, and the config that it gets."""

from __future__ import annotations

import copy
from collections.abc import Collection

from torch import nn

from siliang.methods import METHODS
from siliang.methods.config import BASE, PeftConfig
from siliang.types import ConfigError, nearest


def check_config(peft_config: object) -> None:
    """
    Raises:
        ConfigError: It is not a method's config of siliang.
    """
    if isinstance(peft_config, PeftConfig):
        return
    name, package = type(peft_config).__name__, _package(peft_config)
    if package != "peft":
        raise ConfigError(f"{name} is not a method's config of siliang, such as LoraConfig.")
    known = any(m.config is not None and m.config.__name__ == name for m in METHODS.values())
    way = f"import siliang's: from siliang import {name}." if known else "siliang does not have that method."
    raise ConfigError(f"This {name} is peft's class: {way}")


def check_without_peft(model: nn.Module) -> None:
    """
    Raises:
        ConfigError: The model has adapters of Hugging Face PEFT.
    """
    if any(_package(module) == "peft" for module in model.modules()):
        raise ConfigError("The model has adapters of peft on it: take them off first, with its unload().")


def check_new_name(name: str, names: Collection[str]) -> None:
    """
    Args:
        names: The names of the model's adapters.

    Raises:
        ConfigError: A new adapter cannot be called `name`.
    """
    if not name or any(c in name for c in "./\\") or name == BASE:
        raise ConfigError(f"adapter name {name!r}: use letters, digits, '-' and '_', at least one.")
    if name in names:
        raise ConfigError(f"adapter {name!r} is there already: {', '.join(names)}.")


def check_known(name: str, names: Collection[str]) -> None:
    """
    Args:
        names: The names of the model's adapters.

    Raises:
        ConfigError: None of them is called `name`.
    """
    if name not in names:
        raise ConfigError(
            f"adapter {name!r} is not there; there are {', '.join(names) or 'none'}." + nearest(name, names)
        )


def config_for(base: nn.Module, peft_config: PeftConfig) -> PeftConfig:
    """A copy of a config for a new adapter on `base`, checked again, and completed with the name of the base model.

    Raises:
        ConfigError: A field is not allowed.
    """
    config = copy.deepcopy(peft_config)
    config.__post_init__()  # fields may have been set since it was made
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    if config.task_type is None:
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return config


def _package(value: object) -> str:
    """The package that a value's class is from."""
    return type(value).__module__.partition(".")[0]
