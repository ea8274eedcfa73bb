"""get_peft_model, and PEFT's class of models for each task, by which scripts ask for it. All do the same here."""

# The names are PEFT's, and mean other things in PreTrainedModel.
# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false

from __future__ import annotations

import warnings
from dataclasses import replace

from torch import nn

from siliang.language import Bilingual
from siliang.methods.config import PeftConfig
from siliang.peft_api.checks import check_config
from siliang.peft_api.model import PeftModel
from siliang.types import TaskType


class PeftModelForCausalLM(PeftModel):
    """With task type CAUSAL_LM."""

    TASK = TaskType.CAUSAL_LM


class PeftModelForSeq2SeqLM(PeftModel):
    """With task type SEQ_2_SEQ_LM."""

    TASK = TaskType.SEQ_2_SEQ_LM


class PeftModelForSequenceClassification(PeftModel):
    """With task type SEQ_CLS."""

    TASK = TaskType.SEQ_CLS


class PeftModelForTokenClassification(PeftModel):
    """With task type TOKEN_CLS."""

    TASK = TaskType.TOKEN_CLS


class PeftModelForQuestionAnswering(PeftModel):
    """With task type QUESTION_ANS."""

    TASK = TaskType.QUESTION_ANS


class PeftModelForFeatureExtraction(PeftModel):
    """With task type FEATURE_EXTRACTION."""

    TASK = TaskType.FEATURE_EXTRACTION


class PeftMixedModel(PeftModel):
    """With adapters of several methods, which every PeftModel may have here."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    str(kind.TASK): kind
    for kind in (
        PeftModelForCausalLM,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        PeftModelForQuestionAnswering,
        PeftModelForFeatureExtraction,
    )
}


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Attaches a new adapter to `model`, freezes the rest, and makes the adapter the one that is trained.

    The model itself is changed; `PeftModel.unload()` gives it back.

    Args:
        peft_config: The method and its settings; copied, then completed (target modules, heads, base model's name).
        mixed: As PeftMixedModel; adapters of several methods can be mixed without it too.
        autocast_adapter_dtype: Adapters on half-precision weights are fp32; False: they have the weights' dtype.
        revision: The base model's, for the config.
        low_cpu_mem_usage: Without effect: an adapter is made once, where it is used.

    Raises:
        TargetError: The method's targets are not in the model. The model has not been changed then.
        ConfigError: `peft_config` is not a method's config of siliang.
    """
    check_config(peft_config)
    if revision is not None:
        if peft_config.revision not in (None, revision):
            message = Bilingual(
                f"The config has the base model's revision {peft_config.revision}: {revision} takes its place.",
                f"配置中基座模型的版本是 {peft_config.revision}，改用 {revision}。",
            )
            warnings.warn(message, stacklevel=2)
        peft_config = replace(peft_config, revision=revision)
    kind = PeftMixedModel if mixed else PeftModel.for_task(peft_config.task_type)
    return kind(model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
