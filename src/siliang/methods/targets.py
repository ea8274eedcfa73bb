"""Which layers a method tunes when the user names none, by the base model's `model_type`: the choices of PEFT 0.21."""

from __future__ import annotations

QV_PROJ = ("q_proj", "v_proj")
QUERY_VALUE = ("query", "value")
QUERY_KEY_VALUE = ("query_key_value",)

LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "bart": QV_PROJ,
    "bert": QUERY_VALUE,
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
    "mistral": QV_PROJ,
    "mixtral": QV_PROJ,
    "mpt": ("Wqkv",),
    "mt5": ("q", "v"),
    "opt": QV_PROJ,
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "qwen2": QV_PROJ,
    "qwen3": QV_PROJ,
    "roberta": QUERY_VALUE,
    "stablelm": QV_PROJ,
    "t5": ("q", "v"),
    "xlm-roberta": QUERY_VALUE,
}
