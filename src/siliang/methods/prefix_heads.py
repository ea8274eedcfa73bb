"""The key/value heads of a model's attention, which give a prefix its width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.prefix_hooks import no_attention
from siliang.methods.prompt_hooks import Arguments, first_output
from siliang.models.introspect import (
    attention_host,
    cache_argument,
    is_cross_attention,
    is_disentangled_attention,
    named_arguments,
)
from siliang.types import ConfigError


def attention_heads(model: nn.Module) -> tuple[int, int] | None:
    """The key/value heads of the model's attention and their size, as its caches receive them; None where they cannot
    be found.

    Raises:
        ConfigError: It has none, or none of the one size that a prefix has.
    """
    host, attentions = attention_host(model)
    if not attentions:
        if any(is_disentangled_attention(m) for m in host.modules()):
            return None
        raise no_attention(model)
    recorder = _Recorder()

    def record(module: nn.Module, args: tuple[object, ...], kwargs: Arguments) -> tuple[tuple[()], Arguments]:
        named = named_arguments(module, args, kwargs)
        if not is_cross_attention(named):
            named[cache_argument(module)] = recorder
        return (), named

    handles = [m.register_forward_pre_hook(record, with_kwargs=True) for m in attentions]
    try:
        with torch.no_grad():
            first_output(model, None)
    except Exception:  # the trial of the prefix itself reports it
        return None
    finally:
        for handle in handles:
            handle.remove()
    sizes = recorder.sizes
    if len({(k, v) for k, v in sizes if k != v} | {k for k, _ in sizes}) > 1:
        shown = "; ".join(f"{k[0]} x {k[1]} and {v[0]} x {v[1]}" for k, v in sorted(sizes))
        raise ConfigError(
            Bilingual(
                f"A prefix has one size for the keys and values of all layers, and {type(model).__name__} has several "
                f"({shown}, heads x size). Use prompt_tuning, p_tuning or lora on this model.",
                f"前缀的键和值在各层大小必须一致，而 {type(model).__name__} 有几种（{shown}，"
                "头数 x 大小）。这个模型请用 prompt_tuning、p_tuning 或 lora。",
            )
        )
    return next(iter(sizes))[0] if sizes else None


class _Recorder:
    """A cache that records sizes: the number of heads and their size, of keys and of values."""

    def __init__(self) -> None:
        self.sizes: set[tuple[tuple[int, int], tuple[int, int]]] = set()

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        k, v = ((t.shape[1], t.shape[3]) for t in (key, value))
        self.sizes.add((k, v))
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0
