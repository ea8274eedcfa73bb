"""Keys and values in front of those of every attention: [P_k ; K], [P_v ; V]. Prefix tuning.

PEFT gives the model the prefix as a cache of past tokens. But transformers drops caches under gradient checkpointing,
and models without one have no place for them. Every attention gets the keys and values that it attends to from its
cache. So each attention module gets a cache of its own in each call. It returns the prefix, followed by the module's
own keys and values (or those of the real cache, in generation). This is inside the block, so recomputing the block
repeats it, and it needs no attention interface: BLOOM has caches too. DeBERTa has none: see disentangled_prefix.py.

Positions count on from the virtual tokens, as in PEFT.

Shapes: B batch, N tokens, V virtual tokens, D hidden size, H key/value heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache

from siliang.language import Bilingual
from siliang.methods.disentangled_prefix import DisentangledPrefix
from siliang.methods.prompt_hooks import Arguments, PromptHooks, tensor_in
from siliang.models.introspect import (
    attention_host,
    attention_kind,
    cache_argument,
    cached_length_argument,
    cached_tokens,
    is_cross_attention,
    is_disentangled_attention,
    layer_number,
    mask_argument,
    parameters_of,
    sliding_window,
)
from siliang.ops.layout import Layout
from siliang.types import ConfigError


class PrefixHooks(PromptHooks):
    """[P_k ; K], [P_v ; V] in every layer: prefix tuning (Li and Liang, 2021, arXiv:2101.00190).

    P_k and P_v of a layer are (H, V, K), the same for all rows of a batch.
    """

    REMEDY: ClassVar[str] = Bilingual(
        "Use prompt_tuning, p_tuning or lora on this model.", "这个模型请用 prompt_tuning、p_tuning 或 lora。"
    )

    def _add(self) -> None:
        self._table: Tensor | None = None
        host, attentions = attention_host(self.model)
        self.before(host, self._compute_prefix)
        if "position_ids" not in parameters_of(host):
            for module in host.modules():
                if cached_length_argument(module) is not None:  # BART and RoFormer count positions there
                    self.before(module, self._shift_positions)
        for module in attentions:
            self.before(module, self._extend)
        disentangled = [m for m in host.modules() if is_disentangled_attention(m)]
        for layer, module in enumerate(disentangled):
            DisentangledPrefix(self, module, layer, self.layer)
        if not attentions and not disentangled:
            raise no_attention(self.model)

    def _compute_prefix(self, module: nn.Module, named: Arguments) -> None:
        c = self.config
        assert c.num_layers is not None and c.num_attention_heads is not None
        # rows (V, layers, key and value, H, K) -> (layers, 2, H, V, K)
        self._table = self.prompt().view(self.V, c.num_layers, 2, c.num_attention_heads, -1).permute(1, 2, 3, 0, 4)
        if "position_ids" in parameters_of(module):
            named["position_ids"] = self._positions(module, named)

    def _positions(self, module: nn.Module, named: Arguments) -> Tensor | None:
        if (positions := tensor_in(named, "position_ids")) is not None:
            return positions + self.V
        ids, embeds = tensor_in(named, "input_ids"), tensor_in(named, "inputs_embeds")
        given = ids if ids is not None else embeds
        if given is None:
            return None
        padding = getattr(getattr(module, "embeddings", None), "padding_idx", None)
        if hasattr(getattr(module, "embeddings", None), "create_position_ids_from_input_ids"):
            # RoBERTa counts from its padding number on, and leaves the padding out
            assert padding is not None
            if ids is None:
                return (torch.arange(given.shape[1], device=given.device) + padding + 1 + self.V).unsqueeze(0)
            real = ids.ne(padding).long()
            return (real.cumsum(1) + self.V) * real + padding
        seen, N, mask = cached_tokens(named), given.shape[1], named.get("attention_mask")
        embed = getattr(module, "embed_positions", None)
        # OPT counts the tokens that are not padding; BioGPT, which has the same argument, counts all
        counts = "attention_mask" in parameters_of(embed) and type(module).__name__ != "BioGptModel"
        if isinstance(mask, Tensor) and mask.dim() == 2 and counts:
            return ((mask.long().cumsum(1) + self.V) * mask.long() - 1)[:, -N:]
        return (torch.arange(N, device=given.device) + seen + self.V).unsqueeze(0)

    def _shift_positions(self, module: nn.Module, named: Arguments) -> None:
        if (positions := tensor_in(named, "position_ids")) is not None:
            named["position_ids"] = positions + self.V
        else:
            name = cached_length_argument(module)
            assert name is not None
            named[name] = cast(int, named.get(name, 0)) + self.V

    def layer(self, layer: int) -> Tensor:
        """Keys and values of one layer, (2, H, V, K)."""
        assert self._table is not None, "the prefix reaches the attention through its own model's forward"
        if self.config.num_transformer_submodules == 2:
            # PEFT makes prefixes for self- and cross-attention and drops the latter: these are the ones that it keeps
            layer = 2 * layer % len(self._table)
        return self._table[layer]

    def _extend(self, module: nn.Module, named: Arguments) -> None:
        if is_cross_attention(named):
            return
        cache, mask = cache_argument(module), mask_argument(module)
        inner = cast(Cache | None, named.get(cache))
        if isinstance(inner, EncoderDecoderCache):
            inner = inner.self_attention_cache
        number = layer_number(module)
        assert number is not None
        seen = inner.get_seq_length(number) if inner is not None else 0
        named[cache] = PrefixedCache(self.layer, self.V, inner)
        # the cache of a sliding window keeps fewer tokens than it has seen
        kept = inner.get_mask_sizes(1, number)[0] - 1 if inner is not None and seen else 0
        hidden_BND = tensor_in(named, "hidden_states")
        assert hidden_BND is not None
        named[mask] = self._mask(module, named.get(mask), hidden_BND, seen, kept)
        if (alibi := tensor_in(named, "alibi")) is not None:
            named["alibi"] = self._alibi(alibi, cast(int, module.num_heads))

    def _mask(
        self, module: nn.Module, mask: object, hidden_BND: Tensor, seen: int, kept: int
    ) -> Tensor | Layout | None:
        """The mask with the prefix's columns in front: open to all, or, in a sliding window, to those near enough."""
        V, N = self.V, hidden_BND.shape[1]
        window = _window(module)
        if window is not None and V + seen + N <= window:
            window = None
        if isinstance(mask, Tensor):
            open_ = 1.0 if mask.dim() == 2 or mask.dtype == torch.bool else 0.0
            mask = F.pad(mask, (V, 0), value=open_)
            if window is not None and mask.dim() == 4:
                closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
                mask[..., :V] = mask[..., :V].masked_fill(~self._seen_by(N, seen, window, mask.device), closed)
            return mask
        if isinstance(mask, Layout):
            return mask  # the attention to packed rows handles more keys than queries
        if mask is not None:
            raise ConfigError(
                Bilingual(
                    f"Prefix tuning cannot extend a {type(mask).__name__}: use attn_implementation='sdpa'.",
                    f"Prefix tuning 无法扩展 {type(mask).__name__}：请用 attn_implementation='sdpa'。",
                )
            )
        implementation = str(getattr(getattr(module, "config", None), "_attn_implementation", ""))
        if "flash" in implementation or not getattr(module, "is_causal", False) or (N == 1 and window is None):
            return None
        # without a mask the attention would be causal from the first key on, which is the prefix's
        open_NS = torch.ones(N, V + kept + N, dtype=torch.bool, device=hidden_BND.device).tril(V + kept)
        if window is not None:
            open_NS[:, :V] = self._seen_by(N, seen, window, open_NS.device)
        if implementation == "eager":
            lowest = torch.finfo(hidden_BND.dtype).min
            return torch.zeros_like(open_NS, dtype=hidden_BND.dtype).masked_fill(~open_NS, lowest)[None, None]
        return open_NS[None, None]

    def _seen_by(self, N: int, seen: int, window: int, device: torch.device) -> Tensor:
        """Which of N tokens after `seen` ones see which virtual token, (N, V). As in PEFT the prefix counts as the
        first tokens of the text, which a sliding window leaves behind.
        """
        at_N1 = (torch.arange(N, device=device) + self.V + seen).unsqueeze(1)
        return torch.arange(self.V, device=device) > at_N1 - window

    def _alibi(self, alibi: Tensor, heads: int) -> Tensor:
        """BLOOM's bias, (B * heads, 1, N), with positions -V ... -1 in front: differences alone matter to a softmax."""
        from transformers.models.bloom.modeling_bloom import build_alibi_tensor

        if alibi.dim() != 3:  # Falcon's are rounded to bf16, and a part of its mask
            raise ConfigError(
                Bilingual(
                    f"Prefix tuning cannot extend the positions (ALiBi) of {type(self.model).__name__}. "
                    "Use prompt_tuning, p_tuning or lora on this model.",
                    f"Prefix tuning 无法扩展 {type(self.model).__name__} 的位置（ALiBi）。这个模型请用 "
                    "prompt_tuning、p_tuning 或 lora。",
                )
            )
        slopes = build_alibi_tensor(torch.ones(1, 2, device=alibi.device), heads, alibi.dtype)[:, 0, 1]
        before = slopes[:, None, None] * torch.arange(-self.V, 0, device=alibi.device, dtype=alibi.dtype)
        return torch.cat([before.repeat(len(alibi) // heads, 1, 1), alibi], -1)


class PrefixedCache:
    """The cache that one attention module gets: the prefix, followed by the real cache, if there is one.

    Args:
        prefix: For the number of a layer, its keys and values, (2, H, V, K).
        length: V.
        inner: The real cache.
    """

    def __init__(self, prefix: Callable[[int], Tensor], length: int, inner: Cache | None) -> None:
        self._prefix, self._length, self._inner = prefix, length, inner

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to: the prefix, the cached tokens, then those given.

        Args:
            key, value: The module's own, (B, H, N, K).
            layer_idx: The number of its layer.

        Returns:
            Keys and values, each (B, H, V + cached + N, K).
        """
        if self._inner is not None:
            key, value = self._inner.update(key, value, layer_idx, *args, **kwargs)
        k, v = self._prefix(layer_idx).to(device=key.device, dtype=key.dtype)
        return _after(k, key), _after(v, value)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that came before, the virtual ones among them."""
        seen = self._inner.get_seq_length(layer_idx) if self._inner is not None else 0
        return self._length + seen


def _after(prefix_HVK: Tensor, own_BHNK: Tensor) -> Tensor:
    """The prefix and what follows it, (B, H, V + N, K)."""
    return torch.cat([prefix_HVK.expand(len(own_BHNK), -1, -1, -1), own_BHNK], 2)


def _window(attention: nn.Module) -> int | None:
    """How many tokens an attention looks back at; None for all.

    Raises:
        ConfigError: It attends to chunks, whose borders a prefix would move.
    """
    if attention_kind(attention) == "chunked_attention":
        raise ConfigError(
            Bilingual(
                f"Prefix tuning cannot be used with {type(attention).__name__}, which attends to chunks. "
                "Use prompt_tuning, p_tuning or lora on this model.",
                f"Prefix tuning 不能用于分块注意力的 {type(attention).__name__}。这个模型请用 "
                "prompt_tuning、p_tuning 或 lora。",
            )
        )
    return sliding_window(attention)


def no_attention(model: nn.Module) -> ConfigError:
    """Why a model cannot have a prefix at all."""
    return ConfigError(
        Bilingual(
            f"Prefix tuning finds no attention in {type(model).__name__} that it can reach. "
            "Use method p_tuning, prompt_tuning or lora on this model.",
            f"Prefix tuning 在 {type(model).__name__} 中找不到可用的注意力。这个模型请用 p_tuning、"
            "prompt_tuning 或 lora。",
        )
    )
