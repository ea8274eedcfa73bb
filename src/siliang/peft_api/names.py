"""PEFT's names for what siliang has under others: errors, and its tables of methods."""

from __future__ import annotations

from siliang.methods.config import CONFIG_CLASSES as PEFT_TYPE_TO_CONFIG_MAPPING
from siliang.methods.cpt import ContextPrompt as CPTEmbedding
from siliang.methods.p_tuning import EncodedPrompt as PromptEncoder
from siliang.methods.prompt import Prompt as PromptEmbedding
from siliang.methods.prompt import PromptConfig as PromptLearningConfig
from siliang.peft_api.tuners import TUNERS as PEFT_TYPE_TO_TUNER_MAPPING
from siliang.types import SiliangError as PeftError
from siliang.types import TargetError as NoMatchingPeftModuleError

# adapters of any methods in layers can be mixed
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = PEFT_TYPE_TO_TUNER_MAPPING


# what the names of a method's parameters begin with
PEFT_TYPE_TO_PREFIX_MAPPING = {kind: model.prefix for kind, model in PEFT_TYPE_TO_TUNER_MAPPING.items() if model.prefix}


class PeftWarning(UserWarning):
    """As in PEFT. siliang's own warnings are plain UserWarnings."""


__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "CPTEmbedding",
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftWarning",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptLearningConfig",
]
