"""What is checked before an adapter is attached, and the config that it gets."""

from __future__ import annotations

import copy
from collections.abc import Collection

from torch import nn

from siliang.language import Bilingual, local
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
        raise ConfigError(
            Bilingual(
                f"{name} is not a method's config of siliang, such as LoraConfig.",
                f"{name} 不是 siliang 的方法配置，例如 LoraConfig。",
            )
        )
    known = any(m.config is not None and m.config.__name__ == name for m in METHODS.values())
    way = (
        Bilingual(f"import siliang's: from siliang import {name}.", f"请导入 siliang 的：from siliang import {name}。")
        if known
        else Bilingual("siliang does not have that method.", "siliang 没有这种方法。")
    )
    raise ConfigError(Bilingual(f"This {name} is peft's class: {way}", f"这个 {name} 是 peft 的类：{local(way, 'zh')}"))


def check_without_peft(model: nn.Module) -> None:
    """
    Raises:
        ConfigError: The model has adapters of Hugging Face PEFT.
    """
    if any(_package(module) == "peft" for module in model.modules()):
        raise ConfigError(
            Bilingual(
                "The model has adapters of peft on it: take them off first, with its unload().",
                "模型上有 peft 的适配器：请先用它的 unload() 取下。",
            )
        )


def check_new_name(name: str, names: Collection[str]) -> None:
    """
    Args:
        names: The names of the model's adapters.

    Raises:
        ConfigError: A new adapter cannot be called `name`.
    """
    if not name or any(c in name for c in "./\\") or name == BASE:
        raise ConfigError(
            Bilingual(
                f"adapter name {name!r}: use letters, digits, '-' and '_', at least one.",
                f"适配器名 {name!r}：只能用字母、数字、'-' 和 '_'，至少一个字符。",
            )
        )
    if name in names:
        raise ConfigError(
            Bilingual(
                f"adapter {name!r} is there already: {', '.join(names)}.",
                f"适配器 {name!r} 已存在：{'、'.join(names)}。",
            )
        )


def check_known(name: str, names: Collection[str]) -> None:
    """
    Args:
        names: The names of the model's adapters.

    Raises:
        ConfigError: None of them is called `name`.
    """
    if name not in names:
        raise ConfigError(
            Bilingual(
                f"adapter {name!r} is not there; there are {', '.join(names) or 'none'}.{nearest(name, names)}",
                f"没有适配器 {name!r}；现有：{'、'.join(names) or '无'}。{nearest(name, names).zh}",
            )
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
