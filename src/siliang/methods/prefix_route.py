"""Keys and values in front of those of every attention: [P_k ; K], [P_v ; V]. Prefix tuning.

Prefixes could be handed over as a cache of past tokens, as PEFT does. But caches are taken away under gradient
checkpointing, and models without one have no place for them. What every attention has is the moment where it asks its
cache for the keys and values to attend to. So each attention module is given a cache of its own for that moment, which
answers with the module's own keys and values (or those of the real cache, in generation) and the prefix in front. That
happens inside the block, so recomputing it repeats it, and it needs no attention interface: BLOOM has caches too.
DeBERTa has none: disentangled_prefix.py says what is done there.

Positions count on from the virtual tokens, as in PEFT.

Shapes: B batch, N tokens, V virtual tokens, D hidden size, H key/value heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EncoderDecoderCache

from siliang.methods.disentangled_prefix import DisentangledPrefix
from siliang.methods.route import Route
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
from siliang.ops.packed_attention import Layout
from siliang.types import ConfigError


class PrefixRoute(Route):
    """[P_k ; K], [P_v ; V] in every layer: prefix tuning (Li and Liang, 2021, arXiv:2101.00190).

    P_k and P_v of a layer are (H, V, K), the same for all rows of a batch.
    """

    REMEDY: ClassVar[str] = "Use prompt_tuning, p_tuning or lora on this model."

    def _install(self) -> None:
        self._table: Tensor | None = None
        host, attentions = attention_host(self.model)
        self.before(host, self._begin)
        if "position_ids" not in parameters_of(host):
            for module in host.modules():
                if cached_length_argument(module) is not None:  # BART and RoFormer count by themselves
                    self.before(module, self._shift)
        for module in attentions:
            self.before(module, self._attend)
        disentangled = [m for m in host.modules() if is_disentangled_attention(m)]
        for layer, module in enumerate(disentangled):
            DisentangledPrefix(self, module, layer, self.layer)
        if not attentions and not disentangled:
            raise no_attention(self.model)

    def _begin(self, module: nn.Module, named: dict[str, Any]) -> None:
        c = self.config
        assert c.num_layers is not None and c.num_attention_heads is not None
        # rows (V, layers, key and value, H, K) -> (layers, 2, H, V, K)
        self._table = self.prompt().view(self.V, c.num_layers, 2, c.num_attention_heads, -1).permute(1, 2, 3, 0, 4)
        if "position_ids" in parameters_of(module):
            named["position_ids"] = self._positions(module, named)

    def _positions(self, module: nn.Module, named: dict[str, Any]) -> Tensor | None:
        if named.get("position_ids") is not None:
            return named["position_ids"] + self.V
        ids, embeds = named.get("input_ids"), named.get("inputs_embeds")
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
        counts = (
            "attention_mask" in parameters_of(embed) and type(module).__name__ != "BioGptModel"
        )  # which numbers all tokens
        if mask is not None and mask.dim() == 2 and counts:
            # OPT counts what is no padding
            return ((mask.long().cumsum(1) + self.V) * mask.long() - 1)[:, -N:]
        return (torch.arange(N, device=given.device) + seen + self.V).unsqueeze(0)

    def _shift(self, module: nn.Module, named: dict[str, Any]) -> None:
        if named.get("position_ids") is not None:
            named["position_ids"] = named["position_ids"] + self.V
        else:
            length = cached_length_argument(module)
            assert length is not None
            named[length] = named.get(length, 0) + self.V

    def layer(self, layer: int) -> Tensor:
        """Keys and values of one layer, (2, H, V, K)."""
        assert self._table is not None, "the prefix reaches the attention through its own model's forward"
        if self.config.num_transformer_submodules == 2:
            # PEFT lays the prefix out for self- and cross-attention and empties the latter: this is what is left
            layer = 2 * layer % len(self._table)
        return self._table[layer]

    def _attend(self, module: nn.Module, named: dict[str, Any]) -> None:
        if is_cross_attention(named):
            return
        cache, mask = cache_argument(module), mask_argument(module)
        inner = named.get(cache)
        if isinstance(inner, EncoderDecoderCache):
            inner = inner.self_attention_cache
        seen = inner.get_seq_length(layer_number(module)) if inner is not None else 0
        named[cache] = PrefixedCache(self.layer, self.V, inner)
        kept = (
            inner.get_mask_sizes(1, layer_number(module))[0] - 1 if inner is not None and seen else 0
        )  # a window's cache forgets
        named[mask] = self._mask(module, named.get(mask), named["hidden_states"], seen, kept)
        if named.get("alibi") is not None:
            named["alibi"] = self._alibi(named["alibi"], module.num_heads)  # type: ignore[arg-type]

    def _mask(self, module: nn.Module, mask: Any, hidden_BND: Tensor, seen: int, kept: int) -> Tensor | Layout | None:
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
            return mask  # the attention to packed rows sees by itself that there are more keys than queries
        if mask is not None:
            raise ConfigError(f"Prefix tuning cannot extend a {type(mask).__name__}: use attn_implementation='sdpa'.")
        implementation = str(getattr(getattr(module, "config", None), "_attn_implementation", ""))
        if "flash" in implementation or not getattr(module, "is_causal", False) or (N == 1 and window is None):
            return None
        # no mask means "causal" to the attention, which would line it up with the prefix
        open_NS = torch.ones(N, V + kept + N, dtype=torch.bool, device=hidden_BND.device).tril(V + kept)
        if window is not None:
            open_NS[:, :V] = self._seen_by(N, seen, window, open_NS.device)
        if implementation == "eager":
            lowest = torch.finfo(hidden_BND.dtype).min
            return torch.zeros_like(open_NS, dtype=hidden_BND.dtype).masked_fill(~open_NS, lowest)[None, None]
        return open_NS[None, None]

    def _seen_by(self, N: int, seen: int, window: int, device: Any) -> Tensor:
        """Which of N tokens after `seen` ones see which virtual token, (N, V): PEFT's prefix is a past that the window
        leaves behind.
        """
        at_N1 = (torch.arange(N, device=device) + self.V + seen).unsqueeze(1)
        return torch.arange(self.V, device=device) > at_N1 - window

    def _alibi(self, alibi: Tensor, heads: int) -> Tensor:
        """BLOOM's bias, (B * heads, 1, N), with positions -V ... -1 in front: only differences matter to a softmax."""
        from transformers.models.bloom.modeling_bloom import build_alibi_tensor

        if alibi.dim() != 3:  # Falcon's are rounded to bf16, and a part of its mask
            raise ConfigError(
                f"Prefix tuning cannot extend the positions (ALiBi) of {type(self.model).__name__}. "
                "Use prompt_tuning, p_tuning or lora on this model."
            )
        slopes = build_alibi_tensor(torch.ones(1, 2, device=alibi.device), heads, alibi.dtype)[:, 0, 1]
        before = slopes[:, None, None] * torch.arange(-self.V, 0, device=alibi.device, dtype=alibi.dtype)
        return torch.cat([before.repeat(len(alibi) // heads, 1, 1), alibi], -1)


class PrefixedCache:
    """What one attention module takes for its cache: the real one, if there is one, with the prefix in front.

    Args:
        prefix: Of a layer's number, its keys and values, (2, H, V, K).
        length: V.
    """

    def __init__(self, prefix: Callable[[int], Tensor], length: int, inner: Any) -> None:
        self._prefix, self._length, self._inner = prefix, length, inner

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
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
        return tuple(torch.cat([p.expand(len(own), -1, -1, -1), own], 2) for p, own in ((k, key), (v, value)))  # type: ignore[return-value]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that came before, the virtual ones among them."""
        seen = self._inner.get_seq_length(layer_idx) if self._inner is not None else 0
        return self._length + seen


def _window(attention: nn.Module) -> int | None:
    """How many tokens an attention looks back at; None for all.

    Raises:
        ConfigError: It looks at chunks, whose borders a prefix would move.
    """
    if attention_kind(attention) == "chunked_attention":
        raise ConfigError(
            f"Prefix tuning cannot go before the chunks that {type(attention).__name__} looks at. "
            "Use prompt_tuning, p_tuning or lora on this model."
        )
    return sliding_window(attention)


def no_attention(model: nn.Module) -> ConfigError:
    """Why a model cannot have a prefix at all."""
    return ConfigError(
        f"Prefix tuning finds no attention in {type(model).__name__} that it can reach. "
        "Use method p_tuning, prompt_tuning or lora on this model."
    )
