"""What is tuned: one file a method, and this one table of them."""

from __future__ import annotations

from typing import Any, TypeAlias

from siliang.language import Bilingual
from siliang.methods.adalora import AdaLora, AdaLoraConfig
from siliang.methods.adaption_prompt import AdaptionPrompt, AdaptionPromptConfig
from siliang.methods.beft import Beft, BeftConfig
from siliang.methods.bitfit import BitFit, BitFitConfig
from siliang.methods.boft import BOFT, BOFTConfig
from siliang.methods.c3a import C3A, C3AConfig
from siliang.methods.config import CONFIG_CLASSES, PeftConfig, config_class
from siliang.methods.cpt import CPT, CPTConfig
from siliang.methods.delora import Delora, DeloraConfig
from siliang.methods.fourierft import FourierFT, FourierFTConfig
from siliang.methods.full import Full
from siliang.methods.gralora import Gralora, GraloraConfig
from siliang.methods.head import Head, HeadConfig
from siliang.methods.hira import Hira, HiraConfig
from siliang.methods.hra import HRA, HRAConfig
from siliang.methods.ia3 import IA3, IA3Config
from siliang.methods.lily import Lily, LilyConfig
from siliang.methods.ln_tuning import LNTuning, LNTuningConfig
from siliang.methods.loha import LoHa, LoHaConfig
from siliang.methods.lokr import LoKr, LoKrConfig
from siliang.methods.lora import Lora
from siliang.methods.lora_config import LoraConfig
from siliang.methods.method import Method
from siliang.methods.miss import Miss, MissConfig
from siliang.methods.multitask_prompt_tuning import (
    MultitaskPromptTuning,
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
)
from siliang.methods.oft import OFT, OFTConfig
from siliang.methods.osf import OSF, OSFConfig
from siliang.methods.p_tuning import PromptEncoderConfig, PromptEncoderReparameterizationType, PTuning
from siliang.methods.poly import Poly, PolyConfig
from siliang.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig
from siliang.methods.prompt_tuning import PromptTuning, PromptTuningConfig, PromptTuningInit
from siliang.methods.randlora import RandLora, RandLoraConfig
from siliang.methods.road import Road, RoadConfig
from siliang.methods.shira import Shira, ShiraConfig
from siliang.methods.trainable_tokens import TrainableTokens, TrainableTokensConfig
from siliang.methods.vblora import VBLoRA, VBLoRAConfig
from siliang.methods.vera import Vera, VeraConfig
from siliang.methods.waveft import WaveFT, WaveFTConfig
from siliang.methods.xlora import XLora, XLoraConfig
from siliang.types import ConfigError, nearest

AnyMethod: TypeAlias = Method[Any]  # with whichever config

METHODS: dict[str, AnyMethod] = {
    method.name: method
    for method in (
        Lora(),
        AdaLora(),
        LoHa(),
        LoKr(),
        FourierFT(),
        C3A(),
        Shira(),
        OFT(),
        BOFT(),
        Miss(),
        Vera(),
        Hira(),
        Delora(),
        Gralora(),
        RandLora(),
        VBLoRA(),
        Lily(),
        HRA(),
        OSF(),
        WaveFT(),
        Road(),
        Poly(),
        XLora(),
        IA3(),
        LNTuning(),
        Beft(),
        TrainableTokens(),
        BitFit(),
        PromptTuning(),
        MultitaskPromptTuning(),
        CPT(),
        PTuning(),
        PrefixTuning(),
        AdaptionPrompt(),
        Head(),
        Full(),
    )
}


CONFIG_CLASSES |= {
    str(name): config
    for config in (method.config for method in METHODS.values())
    if config is not None
    for name in (config.peft_type, *config.FORMER_TYPES)
}


def canonical_name(name: str) -> str:
    """The name of a method in the table, for spellings such as Prompt-Tuning, p-tuning or prefix."""
    name = name.strip().lower().replace("-", "_")
    return f"{name}_tuning" if f"{name}_tuning" in METHODS else name


def find_method(name: str) -> AnyMethod:
    """The table's row for `name`.

    Raises:
        ConfigError: There is no such method.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise ConfigError(
            Bilingual(
                f"method {name!r} is not one of {', '.join(METHODS)}.{nearest(name, METHODS)}",
                f"method {name!r} 不是 {'、'.join(METHODS)} 之一。{nearest(name, METHODS).zh}",
            )
        ) from None


def method_of(config: PeftConfig) -> AnyMethod:
    """The table's row for a config, also for one of a subclass.

    Raises:
        ConfigError: No method has such a config.
    """
    rows = {method.config: method for method in METHODS.values() if method.config is not None}
    for kind in type(config).__mro__:
        if kind in rows:
            return rows[kind]
    raise ConfigError(
        Bilingual(
            f"{type(config).__name__} is not the config of a method: {', '.join(k.__name__ for k in rows)}.",
            f"{type(config).__name__} 不是任何方法的配置：{'、'.join(k.__name__ for k in rows)}。",
        )
    )


__all__ = [
    "METHODS",
    "AdaLoraConfig",
    "AdaptionPromptConfig",
    "BOFTConfig",
    "BeftConfig",
    "BitFitConfig",
    "C3AConfig",
    "CPTConfig",
    "DeloraConfig",
    "FourierFTConfig",
    "GraloraConfig",
    "HRAConfig",
    "HeadConfig",
    "HiraConfig",
    "IA3Config",
    "LNTuningConfig",
    "LilyConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "Method",
    "MissConfig",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "OFTConfig",
    "OSFConfig",
    "PolyConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "RandLoraConfig",
    "RoadConfig",
    "ShiraConfig",
    "TrainableTokensConfig",
    "VBLoRAConfig",
    "VeraConfig",
    "WaveFTConfig",
    "XLoraConfig",
    "config_class",
    "find_method",
    "method_of",
]
