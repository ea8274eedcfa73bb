"""ChatGLM3: a pre-norm decoder with grouped keys and values, one fused projection for all three, and rotary
embeddings on half of each head. Module names are the published checkpoint's.

GLM-130B, Zeng et al. 2022 (arXiv:2210.02414) for the family; "ChatGLM", 2024 (arXiv:2406.12793) for this one.

    h = x + dense(attention(rmsnorm(x)))
    y = h + dense_4h_to_h(silu(g) * u),   g, u = the halves of dense_h_to_4h(rmsnorm(h))

Shapes: B batch, L tokens, C hidden_size, H query heads, G heads of keys and values, D channels of a head, R = D / 2
channels that are rotated, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from siliang.language import Bilingual
from siliang.models.chatglm3.config import ChatGLMConfig

# <|user|> and <|observation|>: where a chat model hands over, it writes the next role in the place of </s>
TURN_ENDS = (64795, 64797)
# what transformers calls a model's cache: it was renamed in 5.24. Here it is `cache`, and the older name is taken too
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), computed in fp32."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * wide).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """cos and sin of position * base^(-2i / R), i = 0 .. R/2 - 1.

    The frequencies are computed in fp32 at each forward pass. As a buffer they would be rounded by `.half()`, and lost
    on the meta device; those in published checkpoints are rounded already, and are left unread.
    """

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.rotated = config.kv_channels // 2
        self.base = 10000.0 * config.rope_ratio

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Positions (B, L) to cos and sin, each (B, L, R / 2)."""
        steps = torch.arange(0, self.rotated, 2, device=position_ids.device, dtype=torch.float32)
        angles = position_ids[..., None].float() * self.base ** (-steps / self.rotated)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BHLD: Tensor, cos_BLR: Tensor, sin_BLR: Tensor) -> Tensor:
    """Turns the channel pairs (0, 1), (2, 3), ... of the first R channels; the others pass through."""
    cos, sin = cos_BLR.unsqueeze(1), sin_BLR.unsqueeze(1)  # the same for all heads
    turned, passed = x_BHLD.split([2 * cos.shape[-1], x_BHLD.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned, passed), dim=-1)


class SelfAttention(nn.Module):
    """Causal attention; each of the G heads of keys and values serves H / G query heads."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.attention_dropout = config.attention_dropout
        # these three are read by the attention functions of transformers
        self.num_key_value_groups = config.num_attention_heads // config.multi_query_group_num
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        width = config.num_attention_heads * self.head_dim
        self.widths = [width, *[config.multi_query_group_num * self.head_dim] * 2]
        bias = config.add_bias_linear
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.widths), bias=bias or config.add_qkv_bias)
        self.dense = nn.Linear(width, config.hidden_size, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,  # (B, L, C); of transformers' name, by which prefix tuning knows an attention
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Cache | None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """What attention adds to each token (B, L, C), and its weights, where the attention function gives them."""
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.query_key_value(hidden_states).split(self.widths, dim=-1)
        )
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, kwargs)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(str(self.config._attn_implementation), eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        heads_BLHD, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.dense(heads_BLHD.flatten(-2)), weights


class MLP(nn.Module):
    """SwiGLU, gate and value in one projection."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        bias = config.add_bias_linear
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=bias)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=bias)

    def forward(self, x_BLC: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(x_BLC).chunk(2, dim=-1)
        return self.dense_4h_to_h(F.silu(gate) * up)


class GLMBlock(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm and with a residual connection."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)
        self.dropout = config.hidden_dropout

    # the keyword names are those that GradientCheckpointingLayer looks for
    def forward(
        self,
        x_BLC: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        cache = kwargs.pop("past_key_values", cache)
        added, _ = self.self_attention(self.input_layernorm(x_BLC), rotary, attention_mask, cache, **kwargs)
        x_BLC = x_BLC + F.dropout(added, self.dropout, self.training)
        added = self.mlp(self.post_attention_layernorm(x_BLC))
        return x_BLC + F.dropout(added, self.dropout, self.training)


class GLMTransformer(nn.Module):
    """The blocks and the norm behind them."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GLMBlock(config, i) for i in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)

    def forward(self, x_BLC: Tensor, **kwargs: object) -> Tensor:
        for layer in self.layers:
            x_BLC = layer(x_BLC, **kwargs)
        return self.final_layernorm(x_BLC)


class Embedding(nn.Module):
    """Holds the table under its published name."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.word_embeddings(input_ids)


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What transformers must know of the architecture."""

    config: ChatGLMConfig
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]  # noqa: RUF012  as transformers declares it
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": GLMBlock, "attentions": SelfAttention}  # noqa: RUF012
    # a headless model, or one of classes, opens a checkpoint that has a head
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq$", r"output_layer\.weight$"]  # noqa: RUF012

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embedding.word_embeddings  # type: ignore[union-attr]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.embedding.word_embeddings = value  # type: ignore[union-attr]


class ChatGLMModel(ChatGLMPreTrainedModel):
    """The decoder without a head, whose answer is the hidden states.

    Args:
        with_output_layer: Make the head too. The published checkpoint keeps it inside this module, as
            `transformer.output_layer`; what is built upon this module calls it.
    """

    def __init__(self, config: ChatGLMConfig, with_output_layer: bool = False) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        self.rotary_pos_emb = RotaryEmbedding(config)
        self.encoder = GLMTransformer(config)
        if with_output_layer:
            self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the last norm, (B, L, C).

        Args:
            input_ids: (B, L); or `inputs_embeds` (B, L, C) in their place.
            attention_mask: (B, tokens in the cache + L), 0 where there is padding, which may be on either side.
            position_ids: (B, L). Without them the tokens that the mask lets through are counted from 0.
            cache: Keys and values of the tokens before; they are extended in place.
            kwargs: Handed on to the attention function.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                Bilingual("Give either input_ids or inputs_embeds.", "请给出 input_ids 或 inputs_embeds 之一。")
            )
        x_BLC = cast(Tensor, self.embedding(input_ids) if inputs_embeds is None else inputs_embeds)
        cache = kwargs.pop("past_key_values", cache)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = _positions(x_BLC, attention_mask, cache)
        named: dict[str, Any] = {CACHE: cache}
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BLC,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **named,
        )
        x_BLC = self.encoder(
            x_BLC,
            rotary=self.rotary_pos_emb(position_ids, x_BLC.dtype),
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **(kwargs | named),
        )
        return BaseModelOutputWithPast(last_hidden_state=x_BLC, **named)


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    """The language model. The name is the published one; the model is a plain causal one."""

    _tied_weights_keys = {  # noqa: RUF012  in effect only with tie_word_embeddings
        "transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"
    }

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config, with_output_layer=True)
        if config.eos_token_id == 2 and config.padded_vocab_size > max(TURN_ENDS):
            self.generation_config.eos_token_id = [2, *TURN_ENDS]
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.transformer.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.transformer.output_layer = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, V), and the loss where there are labels (B, L), -100 where a token is not to be learnt.

        Args:
            logits_to_keep: Compute the logits of the last so many tokens only; 0 for all. Or the tokens' indices.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=kwargs.pop("past_key_values", cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.transformer.output_layer(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.padded_vocab_size, **kwargs)
        named: dict[str, Any] = {CACHE: outputs.get(CACHE)}
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions, **named
        )


class ChatGLMForSequenceClassification(GenericForSequenceClassification, ChatGLMPreTrainedModel):
    """Classes read off the last token, by a new head `score`."""

    base_model_prefix = "transformer"


def _positions(x_BLC: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        # padding has no place in the text: every row counts from its own first token
        counted = attention_mask.to(x_BLC.device).long().cumsum(-1) - 1
        return counted.clamp(min=0)[:, -x_BLC.shape[1] :]
    return _places(x_BLC, cache)[None]


def _places(x_BLC: Tensor, cache: Cache | None) -> Tensor:
    """The places (L) of the new tokens in the cache."""
    seen = 0 if cache is None else cache.get_seq_length()
    return torch.arange(x_BLC.shape[1], device=x_BLC.device) + seen
