"""siliang (四两): parameter-efficient fine-tuning of transformers on the machine you have.

The names, defaults and adapter files are those of Hugging Face PEFT. Everything is imported on first use, so that
`import siliang` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from siliang.methods.adalora import AdaLoraConfig
    from siliang.methods.adaption_prompt import AdaptionPromptConfig
    from siliang.methods.arrow import ArrowConfig
    from siliang.methods.bdlora import BdLoraConfig
    from siliang.methods.beft import BeftConfig
    from siliang.methods.bitfit import BitFitConfig
    from siliang.methods.boft import BOFTConfig
    from siliang.methods.c3a import C3AConfig
    from siliang.methods.config import PeftConfig
    from siliang.methods.corda import CordaConfig
    from siliang.methods.cpt import CPTConfig
    from siliang.methods.delora import DeloraConfig
    from siliang.methods.eva import EvaConfig
    from siliang.methods.fourierft import FourierFTConfig
    from siliang.methods.gralora import GraloraConfig
    from siliang.methods.head import HeadConfig
    from siliang.methods.hira import HiraConfig
    from siliang.methods.hra import HRAConfig
    from siliang.methods.ia3 import IA3Config
    from siliang.methods.kasa import KasaConfig
    from siliang.methods.lily import LilyConfig
    from siliang.methods.ln_tuning import LNTuningConfig
    from siliang.methods.loha import LoHaConfig
    from siliang.methods.lokr import LoKrConfig
    from siliang.methods.lora_config import LoraConfig, LoraRuntimeConfig
    from siliang.methods.lora_ga import LoraGAConfig
    from siliang.methods.miss import MissConfig
    from siliang.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig, MultitaskPromptTuningInit
    from siliang.methods.oft import OFTConfig
    from siliang.methods.osf import OSFConfig
    from siliang.methods.p_tuning import PromptEncoderConfig, PromptEncoderReparameterizationType
    from siliang.methods.poly import PolyConfig
    from siliang.methods.prefix_tuning import PrefixTuningConfig
    from siliang.methods.prompt_tuning import PromptTuningConfig, PromptTuningInit
    from siliang.methods.randlora import RandLoraConfig
    from siliang.methods.road import RoadConfig
    from siliang.methods.shira import ShiraConfig
    from siliang.methods.trainable_tokens import TrainableTokensConfig
    from siliang.methods.vblora import VBLoRAConfig
    from siliang.methods.velora import VeloraConfig
    from siliang.methods.vera import VeraConfig
    from siliang.methods.waveft import WaveFTConfig
    from siliang.methods.xlora import XLoraConfig
    from siliang.peft_api.arrow import create_arrow_model
    from siliang.peft_api.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from siliang.peft_api.data_initializations import (
        get_eva_state_dict,
        initialize_lora_eva_weights,
        preprocess_corda,
        preprocess_loraga,
    )
    from siliang.peft_api.for_tasks import (
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
        PeftMixedModel,
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_peft_model,
    )
    from siliang.peft_api.functions import (
        cast_mixed_precision_params,
        check_if_peft_model,
        disable_input_dtype_casting,
        get_base_model_state_dict,
        get_peft_config,
        get_peft_model_state_dict,
        inject_adapter_in_model,
        load_peft_weights,
        prepare_model_for_kbit_training,
        rescale_adapter_scale,
        set_base_model_state_dict,
        set_peft_model_state_dict,
    )
    from siliang.peft_api.loftq import replace_lora_weights_loftq
    from siliang.peft_api.names import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
        CPTEmbedding,
        NoMatchingPeftModuleError,
        PeftError,
        PeftWarning,
        PromptEmbedding,
        PromptEncoder,
        PromptLearningConfig,
    )
    from siliang.peft_api.status import (
        TunerLayerStatus,
        TunerModelStatus,
        get_layer_status,
        get_model_status,
    )
    from siliang.peft_api.to_lora import (
        convert_to_lora,
        save_as_lora,
    )
    from siliang.peft_api.tuners import (
        AdaLoraModel,
        AdaptionPromptModel,
        BeftModel,
        BOFTModel,
        C3AModel,
        DeloraModel,
        FourierFTModel,
        GraloraModel,
        HiraModel,
        HRAModel,
        IA3Model,
        LilyModel,
        LNTuningModel,
        LoHaModel,
        LoKrModel,
        LoraModel,
        MissModel,
        OFTModel,
        OSFModel,
        PolyModel,
        RandLoraModel,
        RoadModel,
        ShiraModel,
        TrainableTokensModel,
        VBLoRAModel,
        VeraModel,
        WaveFTModel,
        XLoraModel,
    )
    from siliang.safety.permissions import allow_code
    from siliang.types import PeftType, SiliangError, TaskType

__version__ = "0.1.0"

_HOME = {
    "ArrowConfig": "siliang.methods.arrow",
    "AutoPeftModel": "siliang.peft_api.auto",
    "AutoPeftModelForCausalLM": "siliang.peft_api.auto",
    "AutoPeftModelForFeatureExtraction": "siliang.peft_api.auto",
    "AutoPeftModelForQuestionAnswering": "siliang.peft_api.auto",
    "AutoPeftModelForSeq2SeqLM": "siliang.peft_api.auto",
    "AutoPeftModelForSequenceClassification": "siliang.peft_api.auto",
    "AutoPeftModelForTokenClassification": "siliang.peft_api.auto",
    "BOFTConfig": "siliang.methods.boft",
    "BOFTModel": "siliang.peft_api.tuners",
    "BdLoraConfig": "siliang.methods.bdlora",
    "BeftConfig": "siliang.methods.beft",
    "BeftModel": "siliang.peft_api.tuners",
    "BitFitConfig": "siliang.methods.bitfit",
    "C3AConfig": "siliang.methods.c3a",
    "C3AModel": "siliang.peft_api.tuners",
    "CPTConfig": "siliang.methods.cpt",
    "CPTEmbedding": "siliang.peft_api.names",
    "DeloraConfig": "siliang.methods.delora",
    "DeloraModel": "siliang.peft_api.tuners",
    "FourierFTConfig": "siliang.methods.fourierft",
    "FourierFTModel": "siliang.peft_api.tuners",
    "AdaLoraConfig": "siliang.methods.adalora",
    "AdaLoraModel": "siliang.peft_api.tuners",
    "GraloraConfig": "siliang.methods.gralora",
    "GraloraModel": "siliang.peft_api.tuners",
    "HRAConfig": "siliang.methods.hra",
    "HRAModel": "siliang.peft_api.tuners",
    "HeadConfig": "siliang.methods.head",
    "HiraConfig": "siliang.methods.hira",
    "HiraModel": "siliang.peft_api.tuners",
    "IA3Config": "siliang.methods.ia3",
    "IA3Model": "siliang.peft_api.tuners",
    "KasaConfig": "siliang.methods.kasa",
    "LNTuningConfig": "siliang.methods.ln_tuning",
    "LNTuningModel": "siliang.peft_api.tuners",
    "LoHaConfig": "siliang.methods.loha",
    "LoHaModel": "siliang.peft_api.tuners",
    "LoKrConfig": "siliang.methods.lokr",
    "LoKrModel": "siliang.peft_api.tuners",
    "LoraConfig": "siliang.methods.lora_config",
    "LoraRuntimeConfig": "siliang.methods.lora_config",
    "EvaConfig": "siliang.methods.eva",
    "CordaConfig": "siliang.methods.corda",
    "LoraGAConfig": "siliang.methods.lora_ga",
    "get_eva_state_dict": "siliang.peft_api.data_initializations",
    "initialize_lora_eva_weights": "siliang.peft_api.data_initializations",
    "preprocess_corda": "siliang.peft_api.data_initializations",
    "preprocess_loraga": "siliang.peft_api.data_initializations",
    "LoraModel": "siliang.peft_api.tuners",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING": "siliang.peft_api.for_tasks",
    "MissConfig": "siliang.methods.miss",
    "MissModel": "siliang.peft_api.tuners",
    "MultitaskPromptTuningConfig": "siliang.methods.multitask_prompt_tuning",
    "MultitaskPromptTuningInit": "siliang.methods.multitask_prompt_tuning",
    "NoMatchingPeftModuleError": "siliang.peft_api.names",
    "OFTConfig": "siliang.methods.oft",
    "OFTModel": "siliang.peft_api.tuners",
    "PEFT_TYPE_TO_CONFIG_MAPPING": "siliang.peft_api.names",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": "siliang.peft_api.names",
    "PEFT_TYPE_TO_TUNER_MAPPING": "siliang.peft_api.names",
    "PeftConfig": "siliang.methods.config",
    "PeftError": "siliang.peft_api.names",
    "PeftMixedModel": "siliang.peft_api.for_tasks",
    "PeftModel": "siliang.peft_api.for_tasks",
    "PeftModelForCausalLM": "siliang.peft_api.for_tasks",
    "PeftModelForFeatureExtraction": "siliang.peft_api.for_tasks",
    "PeftModelForQuestionAnswering": "siliang.peft_api.for_tasks",
    "PeftModelForSeq2SeqLM": "siliang.peft_api.for_tasks",
    "PeftModelForSequenceClassification": "siliang.peft_api.for_tasks",
    "PeftModelForTokenClassification": "siliang.peft_api.for_tasks",
    "PeftType": "siliang.types",
    "PeftWarning": "siliang.peft_api.names",
    "PolyConfig": "siliang.methods.poly",
    "PolyModel": "siliang.peft_api.tuners",
    "PrefixTuningConfig": "siliang.methods.prefix_tuning",
    "PromptEmbedding": "siliang.peft_api.names",
    "PromptEncoder": "siliang.peft_api.names",
    "PromptEncoderConfig": "siliang.methods.p_tuning",
    "PromptEncoderReparameterizationType": "siliang.methods.p_tuning",
    "PromptLearningConfig": "siliang.peft_api.names",
    "PromptTuningConfig": "siliang.methods.prompt_tuning",
    "PromptTuningInit": "siliang.methods.prompt_tuning",
    "RandLoraConfig": "siliang.methods.randlora",
    "RandLoraModel": "siliang.peft_api.tuners",
    "RoadConfig": "siliang.methods.road",
    "RoadModel": "siliang.peft_api.tuners",
    "ShiraConfig": "siliang.methods.shira",
    "ShiraModel": "siliang.peft_api.tuners",
    "SiliangError": "siliang.types",
    "TaskType": "siliang.types",
    "TrainableTokensConfig": "siliang.methods.trainable_tokens",
    "TrainableTokensModel": "siliang.peft_api.tuners",
    "TunerLayerStatus": "siliang.peft_api.status",
    "TunerModelStatus": "siliang.peft_api.status",
    "VBLoRAConfig": "siliang.methods.vblora",
    "VBLoRAModel": "siliang.peft_api.tuners",
    "VeloraConfig": "siliang.methods.velora",
    "VeraConfig": "siliang.methods.vera",
    "VeraModel": "siliang.peft_api.tuners",
    "OSFConfig": "siliang.methods.osf",
    "OSFModel": "siliang.peft_api.tuners",
    "LilyConfig": "siliang.methods.lily",
    "LilyModel": "siliang.peft_api.tuners",
    "AdaptionPromptConfig": "siliang.methods.adaption_prompt",
    "AdaptionPromptModel": "siliang.peft_api.tuners",
    "WaveFTConfig": "siliang.methods.waveft",
    "WaveFTModel": "siliang.peft_api.tuners",
    "XLoraConfig": "siliang.methods.xlora",
    "XLoraModel": "siliang.peft_api.tuners",
    "allow_code": "siliang.safety.permissions",
    "cast_mixed_precision_params": "siliang.peft_api.functions",
    "check_if_peft_model": "siliang.peft_api.functions",
    "convert_to_lora": "siliang.peft_api.to_lora",
    "create_arrow_model": "siliang.peft_api.arrow",
    "disable_input_dtype_casting": "siliang.peft_api.functions",
    "get_base_model_state_dict": "siliang.peft_api.functions",
    "get_layer_status": "siliang.peft_api.status",
    "get_model_status": "siliang.peft_api.status",
    "get_peft_config": "siliang.peft_api.functions",
    "get_peft_model": "siliang.peft_api.for_tasks",
    "get_peft_model_state_dict": "siliang.peft_api.functions",
    "inject_adapter_in_model": "siliang.peft_api.functions",
    "load_peft_weights": "siliang.peft_api.functions",
    "prepare_model_for_kbit_training": "siliang.peft_api.functions",
    "replace_lora_weights_loftq": "siliang.peft_api.loftq",
    "rescale_adapter_scale": "siliang.peft_api.functions",
    "save_as_lora": "siliang.peft_api.to_lora",
    "set_base_model_state_dict": "siliang.peft_api.functions",
    "set_peft_model_state_dict": "siliang.peft_api.functions",
}

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "AdaLoraConfig",
    "AdaLoraModel",
    "AdaptionPromptConfig",
    "AdaptionPromptModel",
    "ArrowConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BOFTConfig",
    "BOFTModel",
    "BdLoraConfig",
    "BeftConfig",
    "BeftModel",
    "BitFitConfig",
    "C3AConfig",
    "C3AModel",
    "CPTConfig",
    "CPTEmbedding",
    "CordaConfig",
    "DeloraConfig",
    "DeloraModel",
    "EvaConfig",
    "FourierFTConfig",
    "FourierFTModel",
    "GraloraConfig",
    "GraloraModel",
    "HRAConfig",
    "HRAModel",
    "HeadConfig",
    "HiraConfig",
    "HiraModel",
    "IA3Config",
    "IA3Model",
    "KasaConfig",
    "LNTuningConfig",
    "LNTuningModel",
    "LilyConfig",
    "LilyModel",
    "LoHaConfig",
    "LoHaModel",
    "LoKrConfig",
    "LoKrModel",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "MissConfig",
    "MissModel",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "NoMatchingPeftModuleError",
    "OFTConfig",
    "OFTModel",
    "OSFConfig",
    "OSFModel",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "PolyConfig",
    "PolyModel",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "RandLoraConfig",
    "RandLoraModel",
    "RoadConfig",
    "RoadModel",
    "ShiraConfig",
    "ShiraModel",
    "SiliangError",
    "TaskType",
    "TrainableTokensConfig",
    "TrainableTokensModel",
    "TunerLayerStatus",
    "TunerModelStatus",
    "VBLoRAConfig",
    "VBLoRAModel",
    "VeloraConfig",
    "VeraConfig",
    "VeraModel",
    "WaveFTConfig",
    "WaveFTModel",
    "XLoraConfig",
    "XLoraModel",
    "allow_code",
    "cast_mixed_precision_params",
    "check_if_peft_model",
    "convert_to_lora",
    "create_arrow_model",
    "disable_input_dtype_casting",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
    "rescale_adapter_scale",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'siliang' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
