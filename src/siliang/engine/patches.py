"""The temporary patches on transformers' objects: forwards of modules, the attention function, the inputs of
`generate`, and the settings of gradient checkpointing.

recompute.py sets the checkpointing of each layer. Other packages have one patch each, in one file: models/weights.py,
models/quantized.py, memory/track.py, plan/fake.py, distributed/. capabilities.py lists what they need of the installed
libraries; if it is missing, the optimization is off, with a reason.

Shapes: H heads, T tokens, K head size, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from siliang.models.checkpointing import enable_checkpointing
from siliang.ops.layout import Layout
from siliang.ops.read_attention import attention as attention_of

if TYPE_CHECKING:
    from transformers.models.bloom.modeling_bloom import BloomAttention
Undo = Callable[[], None]

# attributes that transformers sets on modules for gradient checkpointing
CHECKPOINTING = (
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_require_grads_hook",
    "_require_grads_hooks",
)


def replace_forward(module: nn.Module, forward: Callable[..., object]) -> Undo:
    """Replaces the forward of `module`. The returned function restores the previous one.

    That is the forward of the instance, such as accelerate sets it, or else the forward of the class.
    """
    own = module.__dict__.get("forward")
    module.forward = forward

    def undo() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = own

    return undo


def replace_method(owner: object, name: str, function: Callable[..., object]) -> Undo:
    """Replaces a method of one object. The returned function restores the previous one, of the object or its class."""
    own = owner.__dict__.get(name)
    setattr(owner, name, function)
    return partial(owner.__dict__.pop, name, None) if own is None else partial(setattr, owner, name, own)


def has_own_forward(module: nn.Module) -> bool:
    """Whether the module's forward is replaced."""
    return "forward" in module.__dict__


@contextmanager
def patched(forwards: Iterable[tuple[nn.Module, Callable[..., object]]]) -> Iterator[None]:
    """Within the block, each module has the forward of its pair."""
    undo = [replace_forward(module, forward) for module, forward in forwards]
    try:
        yield
    finally:
        for restore in reversed(undo):
            restore()


def register_attention(
    name: str, function: Callable[..., object], *, masks: str | Callable[..., object] | None = None
) -> None:
    """Registers an attention function with transformers, by name.

    Args:
        masks: What makes its masks, or the name of another function, whose masks it gets; None: models make none.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, function)
    if masks is not None:
        AttentionMaskInterface.register(name, AttentionMaskInterface()[masks] if isinstance(masks, str) else masks)


@contextmanager
def attention_implementation(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Within the block, the model's attentions call the function of this name; each call reads it from the config, in
    every thread."""
    configs = list(_with_parts(config))
    before = [each._attn_implementation for each in configs]
    config._attn_implementation = name
    try:
        yield
    finally:
        for each, own in zip(configs, before, strict=True):  # a whole before its parts, which it sets, too
            each._attn_implementation = own


def pack_bloom(attention: BloomAttention) -> Undo:
    """Patches a BLOOM attention, which does not use transformers' interface, to compute packed rows by sequence."""
    return replace_forward(attention, partial(_bloom_attention, attention, attention.forward))


def checkpoint_layers(model: PreTrainedModel) -> Undo:
    """Turns gradient checkpointing on. The returned function restores the modules' settings, and removes its hooks."""
    modules = list(model.modules())
    before = [({n: m.__dict__[n] for n in CHECKPOINTING if n in m.__dict__}, set(m._forward_hooks)) for m in modules]
    enable_checkpointing(model)
    added = [set(m._forward_hooks) - hooks for m, (_, hooks) in zip(modules, before, strict=True)]

    def undo() -> None:
        for module, (settings, _), hooks in zip(modules, before, added, strict=True):
            for name in CHECKPOINTING:
                module.__dict__.pop(name, None)
            module.__dict__.update(settings)
            for hook in hooks:
                module._forward_hooks.pop(hook, None)

    return undo


def _with_parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and those of its parts, such as text and vision."""
    yield config
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            yield from _with_parts(part)


def _bloom_attention(
    module: BloomAttention,
    own_forward: Callable[..., object],
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Layout | Tensor | None,
    layer_past: Cache | None = None,
    **kwargs: object,
) -> object:
    """BloomAttention.forward on packed rows, by sequence; the module's own forward on padded rows."""
    if not isinstance(attention_mask, Layout):
        return own_forward(hidden_states, residual, alibi, attention_mask, layer_past=layer_past, **kwargs)
    q, k, v = module._reshape(module.query_key_value(hidden_states))
    if layer_past is not None:
        assert module.layer_idx is not None
        k, v = layer_past.update(k, v, module.layer_idx)
    # positions begin at 0 in each sequence, and padding has none: the longest has them all
    lengths, H = attention_mask.lengths, module.num_heads
    longest = lengths.index(max(lengths))
    out = attention_of(
        q,
        k,
        v,
        attention_mask,
        scaling=module.inv_norm_factor,
        causal=True,
        bias_HN=module.beta * alibi[longest * H : longest * H + H, 0],
        dropout_p=module.attention_dropout.p if module.training else 0.0,
    )
    out = module.dense(out.flatten(2))
    dropped = nn.functional.dropout(out, module.hidden_dropout, module.training)
    return residual + dropped, None
