"""What the training step replaces in transformers' objects, and puts back: the forwards of modules, the function that
computes attention, and the settings of gradient checkpointing.

recompute.py alone sets something else of a model, the checkpointing of each layer. Other rooms replace one thing each,
in one file: models/weights.py, models/quantized.py, memory/track.py, plan/fake.py, distributed/. What all of them need
of the installed libraries is listed in capabilities.py; where it is missing, the trick is off, with a reason.

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
from siliang.ops.packed_attention import Layout, packed_attention

if TYPE_CHECKING:
    from transformers.models.bloom.modeling_bloom import BloomAttention
Undo = Callable[[], None]

# what transformers sets on modules when gradient checkpointing is turned on
CHECKPOINTING = (
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_require_grads_hook",
    "_require_grads_hooks",
)


def replace_forward(module: nn.Module, forward: Callable[..., object]) -> Undo:
    """Gives `module` this forward; the function that is returned restores the one before.

    A forward of the instance's own, as accelerate and others set it, is put back; otherwise the class's is there again.
    """
    own = module.__dict__.get("forward")
    module.forward = forward

    def undo() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = own

    return undo


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody has replaced the module's forward."""
    return "forward" in module.__dict__


@contextmanager
def patched(forwards: Iterable[tuple[nn.Module, Callable[..., object]]]) -> Iterator[None]:
    """Within the block each module has the forward beside it."""
    undo = [replace_forward(module, forward) for module, forward in forwards]
    try:
        yield
    finally:
        for restore in reversed(undo):
            restore()


def register_attention(name: str, function: Callable[..., object]) -> None:
    """Adds a function to those that transformers' attentions may call, by name."""
    from transformers import AttentionInterface

    AttentionInterface.register(name, function)


@contextmanager
def attention_implementation(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Within the block a model's attentions call the function of this name, which each call looks up in the config."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def pack_bloom(attention: BloomAttention) -> Undo:
    """Lets a BLOOM attention, which does not go through transformers' interface, compute packed rows by sequence."""
    return replace_forward(attention, partial(_bloom_attention, attention, attention.forward))


def checkpoint_layers(model: PreTrainedModel) -> Undo:
    """Turns gradient checkpointing on; the function that is returned restores the modules' settings, and removes the
    hooks that came with it."""
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
    """BloomAttention.forward on packed rows, by sequence; the module's own on padded ones."""
    if not isinstance(attention_mask, Layout):
        return own_forward(hidden_states, residual, alibi, attention_mask, layer_past=layer_past, **kwargs)
    q, k, v = module._reshape(module.query_key_value(hidden_states))
    if layer_past is not None:
        assert module.layer_idx is not None
        k, v = layer_past.update(k, v, module.layer_idx)
    out = packed_attention(
        q,
        k,
        v,
        attention_mask,
        scaling=module.inv_norm_factor,
        causal=True,
        bias_HN=module.beta * alibi[: module.num_heads, 0],  # the same for every sequence: all begin at 0
        dropout_p=module.attention_dropout.p if module.training else 0.0,
    )
    out = module.dense(out.flatten(2))
    dropped = nn.functional.dropout(out, module.hidden_dropout, module.training)
    return residual + dropped, None
