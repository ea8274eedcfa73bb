"""The shape of a ChatGLM3, under the keys of the published config.json."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from siliang.language import Bilingual
from siliang.types import ModelError


class ChatGLMConfig(PreTrainedConfig):
    """ChatGLM3-6B by default; ChatGLM2-6B has the same architecture.

    Attributes:
        num_layers: Blocks.
        padded_vocab_size: Rows of the embedding; the tokenizer fills only the first 64,798.
        ffn_hidden_size: Width of the MLP, of each of its two halves.
        kv_channels: Channels of a head.
        multi_query_group_num: Heads of the keys and values; each serves num_attention_heads / this query heads.
        seq_length: Tokens that the model was trained on; not a limit here.
        rope_ratio: Stretches the rotary embedding for long texts: its base is 10000 * rope_ratio (50 in the 32k model).
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  as transformers declares it
    attribute_map = {  # noqa: RUF012  what transformers and PEFT ask a config for
        "num_hidden_layers": "num_layers",
        "vocab_size": "padded_vocab_size",
        "intermediate_size": "ffn_hidden_size",
        "head_dim": "kv_channels",
        "num_key_value_heads": "multi_query_group_num",
        "max_position_embeddings": "seq_length",
        "rms_norm_eps": "layernorm_epsilon",
    }

    num_layers: int = 28
    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    multi_query_attention: bool = True
    multi_query_group_num: int = 2
    seq_length: int = 8192
    rope_ratio: float = 1.0
    layernorm_epsilon: float = 1e-5
    add_qkv_bias: bool = True
    add_bias_linear: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0

    # These have one supported value each. They stay in the config so that a saved folder means the same to the
    # published code, whose own defaults differ.
    rmsnorm: bool = True
    post_layer_norm: bool = True
    original_rope: bool = True
    apply_residual_connection_post_layernorm: bool = False

    # transformers 5.4 and later would make a dataclass's __init__ of the fields above; 5.3 leaves them alone
    def __init__(self, **kwargs: Any) -> None:
        for name in ChatGLMConfig.__annotations__:
            setattr(self, name, kwargs.pop(name, getattr(ChatGLMConfig, name)))
        super().__init__(**kwargs)
        if not self.multi_query_attention:
            self.multi_query_group_num = self.num_attention_heads
        self._check()

    def to_dict(self) -> dict[str, Any]:
        """Also under the names by which PEFT, which reads this and not the attributes, sizes a prefix."""
        return super().to_dict() | {
            "num_key_value_heads": self.multi_query_group_num,
            "head_dim": self.kv_channels,
        }

    def _check(self) -> None:
        """Raises ModelError for what this architecture is not: the weights would load, and answer nonsense."""
        for foreign in ("position_encoding_2d", "inner_hidden_size"):
            if hasattr(self, foreign):
                raise ModelError(
                    Bilingual(
                        f"config.json: {foreign} belongs to the first ChatGLM-6B, which has another architecture. "
                        "Supported are ChatGLM2 and ChatGLM3.",
                        f"config.json：{foreign} 属于第一代 ChatGLM-6B，其结构不同。支持 ChatGLM2 和 ChatGLM3。",
                    )
                )
        if getattr(self, "quantization_bit", 0):
            raise ModelError(
                Bilingual(
                    f"config.json: quantization_bit={self.quantization_bit} is ChatGLM's own quantization, "
                    "which is not "
                    "supported. Load the fp16 weights; they can be quantized to 4 bits while loading.",
                    f"config.json：quantization_bit={self.quantization_bit} 是 ChatGLM 自己的量化，不受支持。"
                    "请加载 fp16 权重；加载时可以量化为 4 位。",
                )
            )
        if getattr(self, "pre_seq_len", None):
            raise ModelError(
                Bilingual(
                    f"config.json: pre_seq_len={self.pre_seq_len} asks for a P-tuning v2 prefix inside the "
                    "model, which is "
                    "not supported. Remove it to open the base model; tune a prefix with method: prefix.",
                    f"config.json：pre_seq_len={self.pre_seq_len} 要求模型内带 P-tuning v2 前缀，不受支持。"
                    "请去掉它来打开基座模型；微调前缀请用 method: prefix。",
                )
            )
        for name, only in SUPPORTED.items():
            value = getattr(self, name, only)
            if bool(value) != only:
                raise ModelError(
                    Bilingual(
                        f"config.json: {name}={value!r} is not supported for ChatGLM; it can only be {only}.",
                        f"config.json：ChatGLM 不支持 {name}={value!r}，只能是 {only}。",
                    )
                )
        if self.num_attention_heads % self.multi_query_group_num or self.kv_channels % 4:
            raise ModelError(
                Bilingual(
                    f"config.json: num_attention_heads={self.num_attention_heads} must be a multiple of "
                    f"multi_query_group_num={self.multi_query_group_num}, and kv_channels={self.kv_channels} of 4.",
                    f"config.json：num_attention_heads={self.num_attention_heads} 须是 multi_query_group_num="
                    f"{self.multi_query_group_num} 的倍数，kv_channels={self.kv_channels} 须是 4 的倍数。",
                )
            )


SUPPORTED = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "original_rope": True,
    "apply_residual_connection_post_layernorm": False,
    "interleaved_qkv": False,
}
