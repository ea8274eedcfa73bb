"""Brings virtual tokens to the base model: in front of its embeddings, or, for a prefix, in front of the keys and
values of every attention. All of it is hooks, which go as they came.

Prefixes could be handed over as a cache of past tokens, as PEFT does. But caches are taken away under gradient
checkpointing, and models without one have no place for them. What every attention has is the moment where it asks its
cache for the keys and values to attend to. So each attention module is given a cache of its own for that moment, which
answers with the module's own keys and values (or those of the real cache, in generation) and the prefix in front. That
happens inside the block, so recomputing it repeats it, and it needs no attention interface: BLOOM has caches too.
DeBERTa has none: there, virtual rows are put in front of its hidden states, their keys and values replaced, and their
outputs cut off.

Positions count on from the virtual tokens, as in PEFT.

Shapes: B batch, N tokens, V virtual tokens, D hidden size, H key/value heads, K head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EncoderDecoderCache

from siliang.methods.base import Prompt, PromptConfig
from siliang.methods.prefix_tuning import PrefixTuningConfig
from siliang.models.introspect import (
    attention_host,
    attention_kind,
    backbone,
    cache_argument,
    cached_tokens,
    is_cross_attention,
    is_disentangled_attention,
    is_encoder_decoder,
    layer_number,
    mask_argument,
    named_arguments,
    parameters_of,
    relative_positions,
    sliding_window,
    word_embeddings,
)
from siliang.ops.packed_attention import Layout
from siliang.secrets import shortened
from siliang.types import ConfigError, TaskType, first_line


class Route(ABC):
    """The hooks that bring one prompt to the model. `remove` takes them off."""

    def __init__(self, model: nn.Module, config: PromptConfig, prompt: Prompt) -> None:
        assert config.num_virtual_tokens is not None
        self.model, self.config, self.prompt = model, config, prompt
        self.V = config.num_virtual_tokens
        self._handles: list[Any] = []
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    @classmethod
    def tried(cls, model: nn.Module, config: PromptConfig, prompt: Prompt) -> None:
        """Computes a few tokens with the prompt, to find out before anything is trained whether it reaches the answer.

        Raises:
            ConfigError: It does not.
        """
        name = type(model).__name__
        way = "Use a method that works on layers, such as lora, on this model."
        if isinstance(config, PrefixTuningConfig):
            way = "Use prompt_tuning, p_tuning or lora on this model."
        route = cls.of(model, config, prompt)
        try:
            with torch.enable_grad():
                out = _answer(model, config.task_type)
                trained = list(prompt.parameters())
                reached = torch.autograd.grad(out.sum(), trained, allow_unused=True) if out.requires_grad else [None]
        except ConfigError:
            raise
        except Exception as error:  # of the model's own code, which knows nothing of the prompt
            route.remove()
            if _is_unknown(model, config.task_type, error):
                return
            said = shortened(first_line(error, kind=True), 160)
            raise ConfigError(f"{name} cannot take the virtual tokens of {config.peft_type} ({said}). {way}") from None
        finally:
            route.remove()
        if all(g is None for g in reached):
            raise ConfigError(f"The virtual tokens of {config.peft_type} do not reach the answer of {name}. {way}")

    @staticmethod
    def of(model: nn.Module, config: PromptConfig, prompt: Prompt) -> Route:
        """The route that the method takes.

        Raises:
            ConfigError: The model has no place for it.
        """
        return (PrefixRoute if isinstance(config, PrefixTuningConfig) else EmbeddingRoute)(model, config, prompt)

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @abstractmethod
    def _install(self) -> None:
        """Puts the hooks on."""

    def _before(self, module: nn.Module, change: Callable[[nn.Module, dict[str, Any]], None]) -> None:
        """Lets `change` rewrite the arguments of `module`'s forward, all by name."""
        # nothing local: a model with its hooks must pickle
        self._handles.append(module.register_forward_pre_hook(partial(_rewrite, change), with_kwargs=True))

    def _after(self, module: nn.Module, change: Callable[[nn.Module, Any, Any], Any]) -> None:
        self._handles.append(module.register_forward_hook(change))


class EmbeddingRoute(Route):
    """P ; E(x): prompt tuning and P-tuning."""

    def _install(self) -> None:
        model, task = self.model, self.config.task_type
        self._embeddings: Any = prompted_embeddings(model)
        self._cut = False
        if is_encoder_decoder(model):
            # generate() runs the encoder by itself, so the prompt joins there; the cross-attention's mask grows too
            self._before(model.get_encoder(), self._prepend)  # type: ignore[operator]
            self._before(model, self._grow_mask)
        elif task in (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS) or (
            task is TaskType.SEQ_CLS and hasattr(model, "score")
        ):
            # the head must see the user's own tokens: one answer for each, or that of the last one that is no padding
            self._before(backbone(model), self._prepend)
            self._after(backbone(model), self._cut_off)
        else:
            self._before(model, self._prepend)

    def _prepend(self, module: nn.Module, named: dict[str, Any]) -> None:
        ids, embeds, V = named.get("input_ids"), named.get("inputs_embeds"), self.V
        given = ids if ids is not None else embeds
        if given is None:
            return
        B, N = given.shape[:2]
        seen = cached_tokens(named)
        mask = named.get("attention_mask")
        # in a generation that has begun, the cache holds the virtual tokens already
        if mask is not None and mask.dim() == 2 and mask.shape[1] == (seen + N - V if seen else N):
            named["attention_mask"] = F.pad(mask, (V, 0), value=1)
        positions = named.get("position_ids")
        if positions is not None:
            positions = positions + V
        self._cut = not seen
        if not seen:
            embeds = self._embeddings(ids) if embeds is None else embeds
            P = self.prompt()[:V].to(device=embeds.device, dtype=embeds.dtype)
            named["input_ids"], named["inputs_embeds"] = None, torch.cat([P.expand(B, -1, -1), embeds], 1)
            if named.get("token_type_ids") is not None:
                named["token_type_ids"] = F.pad(named["token_type_ids"], (V, 0))
            if named.get("labels") is not None and self.config.task_type is TaskType.CAUSAL_LM:
                named["labels"] = F.pad(named["labels"], (V, 0), value=-100)
            if positions is not None:
                first = torch.arange(V, device=positions.device).expand(len(positions), -1)
                positions = torch.cat([first, positions], 1)
        if positions is not None:
            named["position_ids"] = positions

    def _grow_mask(self, module: nn.Module, named: dict[str, Any]) -> None:
        if named.get("attention_mask") is not None:
            named["attention_mask"] = F.pad(named["attention_mask"], (self.V, 0), value=1)

    def _cut_off(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self._cut:
            return output
        if isinstance(output, tuple):
            return (output[0][:, self.V :], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, self.V :]
        return output


class PrefixRoute(Route):
    """[P_k ; K], [P_v ; V] in every layer."""

    def _install(self) -> None:
        self._table: Tensor | None = None
        host, attentions = attention_host(self.model)
        self._before(host, self._begin)
        if "position_ids" not in parameters_of(host):
            for module in host.modules():
                if "past_key_values_length" in parameters_of(module) and "Embedding" in type(module).__name__:
                    self._before(module, self._shift)  # BART and RoFormer count by themselves
        for module in attentions:
            self._before(module, self._attend)
        disentangled: list[Any] = [m for m in host.modules() if is_disentangled_attention(m)]
        for layer, module in enumerate(disentangled):
            self._before(module, partial(self._widen, layer=layer))
            self._after(module, self._narrow)
            if hasattr(module, "in_proj"):
                self._after(module.in_proj, partial(self._put_fused, layer=layer, attention=module))
            else:
                self._after(module.key_proj, partial(self._put, layer=layer, which=0))
                self._after(module.value_proj, partial(self._put, layer=layer, which=1))
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
        counts = "attention_mask" in parameters_of(embed) and type(module).__name__ != "BioGptModel"  # it numbers all
        if mask is not None and mask.dim() == 2 and counts:
            # OPT counts what is no padding
            return ((mask.long().cumsum(1) + self.V) * mask.long() - 1)[:, -N:]
        return (torch.arange(N, device=given.device) + seen + self.V).unsqueeze(0)

    def _shift(self, module: nn.Module, named: dict[str, Any]) -> None:
        if named.get("position_ids") is not None:
            named["position_ids"] = named["position_ids"] + self.V
        else:
            named["past_key_values_length"] = named.get("past_key_values_length", 0) + self.V

    def _layer(self, layer: int) -> Tensor:
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
        named[cache] = PrefixedCache(self._layer, self.V, inner)
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

    # ---- DeBERTa ----

    def _widen(self, module: nn.Module, named: dict[str, Any], *, layer: int) -> None:
        V, hidden_BND = self.V, named["hidden_states"]
        named["hidden_states"] = F.pad(hidden_BND, (0, 0, V, 0))
        self._widened = named["hidden_states"].shape[:2]
        if named.get("query_states") is not None:
            named["query_states"] = F.pad(named["query_states"], (0, 0, V, 0))
        # (B, 1, N, N): the virtual rows may look at anything, for their output is cut off
        named["attention_mask"] = F.pad(named["attention_mask"], (V, 0, V, 0), value=1)
        if named.get("relative_pos") is not None:
            named["relative_pos"] = relative_positions(module, named["hidden_states"])

    def _narrow(self, module: nn.Module, args: Any, out: Any) -> Any:
        return (out[0][:, self.V :], *out[1:])

    def _put(self, module: nn.Module, args: Any, out_BND: Tensor, *, layer: int, which: int) -> Tensor:
        """The prefix in the place of the virtual rows of a key or value projection."""
        if out_BND.shape[:2] != self._widened:  # DeBERTa sends its table of relative positions through here as well
            return out_BND
        P_VD = self._layer(layer)[which].transpose(0, 1).flatten(1).to(out_BND.dtype)
        return torch.cat([P_VD.expand(len(out_BND), -1, -1), out_BND[:, self.V :]], 1)

    def _put_fused(self, module: nn.Module, args: Any, out: Tensor, *, layer: int, attention: Any) -> Tensor:
        """The same for DeBERTa v1's one projection: for each head query, key and value in turn."""
        heads = attention.num_attention_heads
        k_HVK, v_HVK = self._layer(layer).to(out.dtype)
        rows = out[:, : self.V].unflatten(-1, (heads, 3, -1))
        k, v = (t.transpose(0, 1).expand(len(out), -1, -1, -1) for t in (k_HVK, v_HVK))
        rows = torch.stack([rows[..., 0, :], k, v], -2).flatten(-3)
        return torch.cat([rows, out[:, self.V :]], 1)


class PrefixedCache:
    """What one attention module takes for its cache: the real one, if there is one, with the prefix in front.

    Args:
        prefix: Of a layer's number, its keys and values, (2, H, V, K).
        length: V.
    """

    def __init__(self, prefix: Callable[[int], Tensor], length: int, inner: Any) -> None:
        self._prefix, self._length, self._inner = prefix, length, inner

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(B, H, N, K) of either in; the same with the cached tokens and the prefix before them out."""
        if self._inner is not None:
            key, value = self._inner.update(key, value, layer_idx, *args, **kwargs)
        k, v = self._prefix(layer_idx).to(device=key.device, dtype=key.dtype)
        return tuple(torch.cat([p.expand(len(own), -1, -1, -1), own], 2) for p, own in ((k, key), (v, value)))  # type: ignore[return-value]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that came before, the virtual ones among them."""
        seen = self._inner.get_seq_length(layer_idx) if self._inner is not None else 0
        return self._length + seen


def _rewrite(
    change: Callable[[nn.Module, dict[str, Any]], None], module: nn.Module, args: Any, kwargs: Any
) -> tuple[tuple[()], dict[str, Any]]:
    named = named_arguments(module, args, kwargs)
    change(module, named)
    return (), named


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


def attention_heads(model: nn.Module) -> tuple[int, int] | None:
    """The key/value heads of the model's attention and their size, as its caches are given them; None where that cannot
    be found out.

    Raises:
        ConfigError: It has none, or none of the one size that a prefix has.
    """
    host, attentions = attention_host(model)
    if not attentions:
        if any(is_disentangled_attention(m) for m in host.modules()):
            return None
        raise no_attention(model)
    recorder = _Recorder()

    def record(module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
        named = named_arguments(module, args, kwargs)
        if not is_cross_attention(named):
            named[cache_argument(module)] = recorder
        return (), named

    handles = [m.register_forward_pre_hook(record, with_kwargs=True) for m in attentions]
    try:
        with torch.no_grad():
            _answer(model, None)
    except Exception:  # whatever it is, trying the prefix itself will say so
        return None
    finally:
        for handle in handles:
            handle.remove()
    sizes = recorder.sizes
    if len({(k, v) for k, v in sizes if k != v} | {k for k, _ in sizes}) > 1:
        shown = "; ".join(f"{k[0]} x {k[1]} and {v[0]} x {v[1]}" for k, v in sorted(sizes))
        raise ConfigError(
            f"A prefix has one size for the keys and values of all layers, and {type(model).__name__} has several "
            f"({shown}, heads x size). Use prompt_tuning, p_tuning or lora on this model."
        )
    return next(iter(sizes))[0] if sizes else None


class _Recorder:
    """A cache that notes the sizes of what it is given: heads and their size, of keys and of values."""

    def __init__(self) -> None:
        self.sizes: set[tuple[tuple[int, int], tuple[int, int]]] = set()

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        k, v = ((t.shape[1], t.shape[3]) for t in (key, value))
        self.sizes.add((k, v))
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def no_attention(model: nn.Module) -> ConfigError:
    """Why a model cannot have a prefix at all."""
    return ConfigError(
        f"Prefix tuning finds no attention in {type(model).__name__} that it can reach. "
        "Use method p_tuning, prompt_tuning or lora on this model."
    )


def _answer(model: Any, task: TaskType | None) -> Tensor:
    """What the model says to four tokens, with nothing random in it; the model is left as it was."""
    config = getattr(model, "config", None)
    training = [m for m in model.modules() if m.training]
    end = getattr(config, "eos_token_id", None)
    ids = torch.ones(1, 4, dtype=torch.long, device=next(model.parameters()).device)
    if isinstance(end, int):
        ids[0, -1] = end  # BART's classifier reads its answer there
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if is_encoder_decoder(model) and task is not TaskType.SEQ_CLS and "decoder_input_ids" in parameters_of(model):
        inputs["decoder_input_ids"] = ids[:, :2]
    try:
        model.eval()
        out = model(**inputs)
    finally:
        for module in training:
            module.training = True
    tensors = [t for t in (out.values() if hasattr(out, "values") else out) if isinstance(t, Tensor)]
    return tensors[0]


def _is_unknown(model: nn.Module, task: TaskType | None, error: Exception) -> bool:
    """Whether an error says nothing of the prompt: the model does not compute these tokens without it either, or it
    cannot without data."""
    if next(model.parameters()).is_meta and isinstance(error, NotImplementedError):
        return True
    try:
        with torch.no_grad():
            _answer(model, task)
    except Exception:
        return True
    return False


def prompted_embeddings(model: nn.Module) -> nn.Module:
    """The word embeddings that virtual tokens stand beside.

    Raises:
        ConfigError: The model has none.
    """
    found = word_embeddings(model)
    if found is None:
        raise ConfigError(
            f"Virtual tokens need a transformers model with word embeddings, and {type(model).__name__} is none: "
            "use a method that works on layers, such as lora."
        )
    return found
