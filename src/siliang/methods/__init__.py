"""What is tuned: one file a method, and this one table of them."""

from __future__ import annotations

from typing import Any

from siliang.methods.bitfit import BitFit, BitFitConfig
from siliang.methods.config import PeftConfig, config_class
from siliang.methods.full import Full
from siliang.methods.head import Head, HeadConfig
from siliang.methods.ia3 import IA3, IA3Config
from siliang.methods.ln_tuning import LNTuning, LNTuningConfig
from siliang.methods.lora import Lora, LoraConfig
from siliang.methods.method import Method
from siliang.methods.p_tuning import PromptEncoderConfig, PromptEncoderReparameterizationType, PTuning
from siliang.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig
from siliang.methods.prompt_tuning import PromptTuning, PromptTuningConfig, PromptTuningInit
from siliang.types import ConfigError, nearest

METHODS: dict[str, Method[Any]] = {
    method.name: method
    for method in (
        Lora(),
        IA3(),
        LNTuning(),
        BitFit(),
        PromptTuning(),
        PTuning(),
        PrefixTuning(),
        Head(),
        Full(),
    )
}


def whole_name(name: str) -> str:
    """A method's name as the table has it, of Prompt-Tuning, p-tuning, prefix ..."""
    name = name.strip().lower().replace("-", "_")
    return f"{name}_tuning" if f"{name}_tuning" in METHODS else name


def find_method(name: str) -> Method[Any]:
    """The table's row for `name`.

    Raises:
        ConfigError: There is no such method.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise ConfigError(f"method {name!r} is not one of {', '.join(METHODS)}." + nearest(name, METHODS)) from None


def method_of(config: PeftConfig) -> Method[Any]:
    """The table's row for a config."""
    return next(m for m in METHODS.values() if m.config is type(config))


__all__ = [
    "METHODS",
    "BitFitConfig",
    "HeadConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoraConfig",
    "Method",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "config_class",
    "find_method",
    "method_of",
]
