"""Which layers a method tunes when the user names none, by the base model's `model_type`: the choices of PEFT 0.21, and
ours for the types that it leaves out (chatglm, glm, and the norms of BERT and similar models).
"""

from __future__ import annotations

QV_PROJ = ("q_proj", "v_proj")
QUERY_VALUE = ("query", "value")
QUERY_KEY_VALUE = ("query_key_value",)

LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "bart": QV_PROJ,
    "bert": QUERY_VALUE,
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "bloom": QUERY_KEY_VALUE,
    "chatglm": QUERY_KEY_VALUE,
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "electra": QUERY_VALUE,
    "falcon": QUERY_KEY_VALUE,
    "gemma": QV_PROJ,
    "gemma2": QV_PROJ,
    "gemma3_text": QV_PROJ,
    "glm": QV_PROJ,
    "glm4": QV_PROJ,
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "gpt_neo": QV_PROJ,
    "gpt_neox": QUERY_KEY_VALUE,
    "gptj": QV_PROJ,
    "layoutlm": QUERY_VALUE,
    "llama": QV_PROJ,
    "llama4": QV_PROJ,
    "mistral": QV_PROJ,
    "mixtral": QV_PROJ,
    "mpt": ("Wqkv",),
    "mt5": ("q", "v"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "opt": QV_PROJ,
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "qwen2": QV_PROJ,
    "qwen3": QV_PROJ,
    "roberta": QUERY_VALUE,
    "rwkv": ("key", "value", "receptance", "output"),
    "stablelm": QV_PROJ,
    "t5": ("q", "v"),
    "xlm-roberta": QUERY_VALUE,
}

ADALORA_TARGETS = LORA_TARGETS | {
    "bart": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
    "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "roberta": ("query", "key", "value", "dense"),
    "t5": ("q", "k", "v", "o", "wi", "wo"),
}

ALL_OF_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")
_AND_DOWN = ("query_key_value", "dense_4h_to_h")
OSF_TARGETS: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("gemma", "gemma2", "gemma3_text", "llama", "llama4", "mistral", "mixtral", "phi", "qwen2", "qwen3"), ALL_OF_LLAMA
) | {
    "bloom": _AND_DOWN,
    "falcon": _AND_DOWN,
    "gpt2": ("c_attn", "c_proj"),
    "gpt_bigcode": ("c_attn", "c_proj"),
    "gpt_neox": _AND_DOWN,
    "gptj": ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}

SHIRA_TARGETS = LORA_TARGETS | {"phi": QV_PROJ}

FOURIERFT_TARGETS = LORA_TARGETS | {"gpt2": ("mlp.c_proj",), "gpt_bigcode": ("mlp.c_proj",)}  # and C3A's

# The value projections among them, where a layer makes values alone.
VALUES = ("v_proj", "value", "v", "value_proj")
BEFT_TARGETS: dict[str, tuple[str, ...]] = {
    model_type: values
    for model_type, names in LORA_TARGETS.items()
    if (values := tuple(name for name in names if name in VALUES))
}

IA3_TARGETS: dict[str, tuple[str, ...]] = {
    "bart": ("q_proj", "v_proj", "fc2"),
    "bert": ("key", "value", "output.dense"),
    "bloom": ("query_key_value", "mlp.dense_4h_to_h"),
    "chatglm": ("query_key_value", "mlp.dense_4h_to_h"),
    "deberta": ("in_proj", "output.dense"),
    "deberta-v2": ("key_proj", "value_proj", "output.dense"),
    "falcon": ("query_key_value", "dense_4h_to_h"),
    "gemma": ("q_proj", "v_proj", "down_proj"),
    "gemma2": ("q_proj", "v_proj", "down_proj"),
    "gemma3_text": ("q_proj", "v_proj", "down_proj"),
    "glm": ("k_proj", "v_proj", "down_proj"),
    "glm4": ("k_proj", "v_proj", "down_proj"),
    "gpt2": ("c_attn", "mlp.c_proj"),
    "gpt_bigcode": ("c_attn", "mlp.c_proj"),
    "gpt_neo": ("q_proj", "v_proj", "c_proj"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
    "gptj": ("q_proj", "v_proj", "fc_out"),
    "llama": ("k_proj", "v_proj", "down_proj"),
    "llama4": ("q_proj", "v_proj", "down_proj"),
    "mistral": ("k_proj", "v_proj", "down_proj"),
    "mixtral": ("k_proj", "v_proj", "w2"),
    "mt5": ("k", "v", "wi_1"),
    "opt": ("q_proj", "k_proj", "fc2"),
    "phi": ("q_proj", "v_proj", "fc2"),
    "qwen2": ("q_proj", "v_proj", "down_proj"),
    "qwen3": ("q_proj", "v_proj", "down_proj"),
    "roberta": ("key", "value", "output.dense"),
    "t5": ("k", "v", "wo"),
}

# Those of IA3's targets whose input is scaled instead of their output.
IA3_FEEDFORWARD: dict[str, tuple[str, ...]] = {
    "bart": ("fc2",),
    "bert": ("output.dense",),
    "bloom": ("mlp.dense_4h_to_h",),
    "chatglm": ("mlp.dense_4h_to_h",),
    "deberta": ("output.dense",),
    "deberta-v2": ("output.dense",),
    "falcon": ("dense_4h_to_h",),
    "gemma": ("down_proj",),
    "gemma2": ("down_proj",),
    "gemma3_text": ("down_proj",),
    "glm": ("down_proj",),
    "glm4": ("down_proj",),
    "gpt2": ("mlp.c_proj",),
    "gpt_bigcode": ("mlp.c_proj",),
    "gpt_neo": ("c_proj",),
    "gpt_neox": ("dense_4h_to_h",),
    "gptj": ("fc_out",),
    "llama": ("down_proj",),
    "llama4": ("down_proj",),
    "mistral": ("down_proj",),
    "mixtral": ("w2",),
    "mt5": (),
    "opt": ("fc2",),
    "phi": ("fc2",),
    "qwen2": ("down_proj",),
    "qwen3": ("down_proj",),
    "roberta": ("output.dense",),
    "t5": ("wo",),
}

GEMMA_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "norm",
)

LN_TARGETS: dict[str, tuple[str, ...]] = {
    "bart": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    "bert": ("LayerNorm",),
    "bloom": ("input_layernorm", "post_attention_layernorm", "ln_f"),
    "chatglm": ("input_layernorm", "post_attention_layernorm", "final_layernorm"),
    "deberta": ("LayerNorm",),
    "deberta-v2": ("LayerNorm",),
    "electra": ("LayerNorm",),
    "falcon": ("input_layernorm", "post_attention_layernorm", "ln_f"),
    "gemma": ("input_layernorm", "post_attention_layernorm", "norm"),
    "gemma2": GEMMA_NORMS,
    "gemma3_text": GEMMA_NORMS,
    "glm": ("input_layernorm", "post_attention_layernorm", "norm"),
    "glm4": ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm", "norm"),
    "gpt2": ("ln_1", "ln_2", "ln_f"),
    "gptj": ("ln_1", "ln_f"),
    "llama": ("input_layernorm", "post_attention_layernorm", "norm"),
    "mistral": ("input_layernorm", "post_attention_layernorm", "norm"),
    "mt5": ("layer_norm", "final_layer_norm"),
    "phi": ("input_layernorm", "final_layernorm"),
    "qwen2": ("post_attention_layernorm",),
    "qwen3": ("post_attention_layernorm",),
    "roberta": ("LayerNorm",),
    "t5": ("layer_norm", "final_layer_norm"),
    "xlm-roberta": ("LayerNorm",),
}
