"""A model of each type that transformers has, on the meta device, with random numbers nowhere."""

from functools import lru_cache
from typing import Any

import torch
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]

ROPE = {"rope_type": "default", "rope_theta": 1e4}
ROPES = {"full_attention": ROPE, "sliding_attention": ROPE}
INDEXER = {
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "indexer_head_dim": 256,
    "indexer_kv_heads": 1,
    "indexer_n_heads": 2,
}
# what a config lacks without which its model cannot be built
SETTINGS: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4},
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    "chameleon": {"vocabulary_map": {"<image>": 3}},
    "cohere_compass": {"text_config": {"model_type": "cohere_compass_text", "rope_parameters": ROPES}},
    "cohere_compass_text": {"rope_parameters": ROPES},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 1e4}},
    "diffusion_gemma": {
        "text_config": {
            "model_type": "diffusion_gemma_text",
            "num_experts": 4,
            "moe_intermediate_size": 64,
            "top_k_experts": 2,
        }
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<image>": 3, "<|extra_200|>": 4}},
    "encoder-decoder": {"encoder": {"model_type": "bert"}, "decoder": {"model_type": "bert"}},
    "esm": {"vocab_size": 33},
    "funnel": {"architectures": []},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "granite4_vision": {"deepstack_layer_map": [[0, 1]], "downsample_rate": "4/8"},
    "hunyuan_v1_dense": {"head_dim": 64},
    "hunyuan_v1_moe": {"head_dim": 64},
    "hunyuan_vl": {"text_config": {"model_type": "hunyuan_vl_text", "head_dim": 64}},
    "hunyuan_vl_text": {"head_dim": 64},
    "informer": {"prediction_length": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": {"model_type": "qwen4_exp_text"} | INDEXER},
    "qwen4_exp_text": INDEXER,
    "speech-encoder-decoder": {"encoder": {"model_type": "wav2vec2"}, "decoder": {"model_type": "bert"}},
    "time_series_transformer": {"prediction_length": 4},
    "vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": {"model_type": "bert"}},
}
# that cannot be built here, and why
NOT_BUILT = {
    "deepseek_ocr2": "its text config says no kinds of layers",
    "evolla": "its automatic classes know its config under another name",
    "moonshine_streaming": "its model asks its config for what that does not have",
    "musicgen": "its automatic class builds a model of sounds from a config that lacks a dropout",
    "musicgen_melody": "its automatic class builds a model of sounds from a config that lacks a dropout",
    "pp_ocrv5_server_det": "reads images, and its config says no sizes",
    "pp_ocrv6_medium_det": "reads images, and its config says no sizes",
    "qwen3_omni_moe": "its model asks its config for what that does not have",
    "t5gemma2_encoder": "its model asks its config for what that does not have",
    "vitmatte": "reads images, and its config cannot be read twice",
    "voxtral_realtime_text": "transformers names a class that it does not have",
}


AUTOMATIC = [getattr(modeling_auto, name) for name in dir(modeling_auto) if name.startswith("AutoModel")]
AUTOMATIC = [one for one in AUTOMATIC if getattr(one, "_model_mapping", None) is not None]


def automatic_classes(model_type: str) -> list[Any]:
    """The classes of transformers that make a model of this type; none for a type that is a part of others."""
    return [one for one in AUTOMATIC if model_type in one._model_mapping._model_mapping]


@lru_cache(maxsize=8)
def build(model_type: str) -> Any:
    """A model of this type on the meta device.

    Raises:
        ImportError: It needs a library that is not here.
    """
    with torch.device("meta"):
        return automatic_classes(model_type)[0].from_config(CONFIG_MAPPING[model_type](**SETTINGS.get(model_type, {})))


ALL_TYPES = sorted(CONFIG_MAPPING_NAMES)
