"""Takes the padding out of a batch before the model's layers and, where something behind them wants it, puts it back.

    embeddings (S, W, D)  ->  [ layers: (1, T, D), attention by sequence ]  ->  head: (1, T, D), or (S, W, D) again

Embeddings, positions, prompts, poolers and task heads see the padded batch that they were written for; the layers,
which are all the cost, see its T tokens alone. It goes through transformers' attention interface (BLOOM, which has
none, gets the same attention here) and is put on only within `without`; whether a model gives the same results so is
not believed but tried (`PaddingFree.fits`).

Shapes: S sequences, W columns of the padded batch, T tokens, V virtual tokens in front of each sequence, D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from siliang.engine.forwards import replace_forward
from siliang.engine.frozen import FrozenBelow
from siliang.ops.packed_attention import Layout, packed_attention
from siliang.secrets import shortened
from siliang.types import first_line
from siliang.virtual_tokens import backbone, by_name, is_encoder_decoder

ATTENTION = "siliang_packed"
LONGEST_REASON = 100  # characters of an error of the model's own
UNKNOWN = ("softcap", "s_aux", "position_bias")  # what some models want of their attention, and ours does not do


class NotPackableError(Exception):
    """The model has something that does not work on packed rows."""


class PaddingFree:
    """The means to run one model without padding.

    Attributes:
        layout: Of the batch that is going through; None outside of `without`.
        layers: The model's.
        below: Keeps what the lower layers say, where that is the same each time.
        keeps: What comes behind the layers can do with packed rows too (GPT-2 reshapes to the padded batch). Found out
            by `fits`.
    """

    def __init__(self, model: nn.Module) -> None:
        """Prepares `model`, the base model with whatever is attached to it.

        Raises:
            NotPackableError: It is not of a kind that could work.
        """
        if is_encoder_decoder(model):
            raise NotPackableError("an encoder-decoder's cross-attention needs the padded rows")
        self._config: Any = getattr(model, "config", None)
        self.layers = find_layers(model)
        self.below: FrozenBelow | None = None
        AttentionInterface.register(ATTENTION, attend)
        self.layout: Layout | None = None
        self.keeps = False
        self._rows: tuple[tuple[int, ...], int] | None = None
        self._keep_packed = False
        self._packed: dict[int, tuple[Any, Any]] = {}
        self._handles = [layer.register_forward_pre_hook(self._enter, with_kwargs=True) for layer in self.layers]
        self._handles += [layer.register_forward_hook(self._leave) for layer in {self.layers[0], self.layers[-1]}]
        self._undo = [
            replace_forward(m, partial(_bloom_attention, m, m.forward)) for m in model.modules() if _is_bloom(m)
        ]

    def close(self) -> None:
        """Takes everything off the model again."""
        for handle in self._handles:
            handle.remove()
        for restore in self._undo:
            restore()

    @contextmanager
    def without(self, lengths: tuple[int, ...], width: int, *, keep_packed: bool = False) -> Iterator[None]:
        """Within the block, which must hold the backward pass as well, the model's layers see no padding.

        Args:
            lengths: Tokens of each sequence of the batch, which is padded on the right.
            width: Its columns.
            keep_packed: What comes behind the layers gets (1, T, D) too.
        """
        before = self._config._attn_implementation
        self._rows, self._keep_packed = (lengths, width), keep_packed
        self._config._attn_implementation = ATTENTION
        try:
            yield
        finally:
            self._config._attn_implementation = before
            self.layout = self._rows = None
            self._packed.clear()

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._rows is None:
            return None
        named = by_name(layer, args, kwargs)
        parameters = inspect.signature(layer.forward).parameters
        hidden = named.pop(next(iter(parameters)))
        if layer is self.layers[0]:
            lengths, width = self._rows
            virtual = hidden.shape[1] - width
            self.layout = Layout.of(tuple(n + virtual for n in lengths), width + virtual, hidden.device)
            hidden = self.layout.pack(hidden)
        if self.below is not None and layer is self.layers[self.below.cut]:
            assert self.layout is not None
            hidden = self.below.enter(hidden, self.layout.lengths)
        assert self.layout is not None
        named = {key: self._pack(value) for key, value in named.items()}
        if "attention_mask" in parameters:
            named["attention_mask"] = self.layout
        return (hidden,), named

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> Any:
        if self.below is not None and layer is self.layers[0]:
            self.below.left(output)
        if layer is not self.layers[-1] or self._rows is None or self._keep_packed:
            return None
        assert self.layout is not None
        if isinstance(output, tuple):
            return (self.layout.unpack(output[0]), *output[1:])
        return self.layout.unpack(output)

    def _pack(self, value: Any) -> Any:
        """Rotary tables, positions: whatever has a row for each column of the batch; each once a step."""
        if isinstance(value, tuple) and any(isinstance(v, Tensor) for v in value):
            return tuple(map(self._pack, value))
        layout = self.layout
        assert layout is not None
        S = len(layout.lengths)
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != layout.width:
            return value
        if value.shape[0] not in (1, S):
            return value
        if id(value) not in self._packed:
            packed = layout.pack(value.expand(S, *value.shape[1:]))
            self._packed[id(value)] = (value, packed)  # the value too: while it lives, its id is its own
        return self._packed[id(value)][1]

    @torch.no_grad()
    def fits(self, model: nn.Module, vocabulary: int, *, comparing: bool = True) -> str | None:
        """Runs three short sequences both ways.

        Args:
            model: As it is called in training.
            comparing: Compare the results, and not only see that it runs.

        Returns:
            Why packed rows are not to be used with this model; None where both ways give the same.
        """
        lengths, width = (5, 2, 4), 5
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(min(5, vocabulary - 1), vocabulary, (3, width), generator=generator)
        mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
        batch = {"input_ids": (ids * mask).to(device), "attention_mask": mask.long().to(device)}
        training = model.training
        model.eval()
        try:
            with suppress(Exception), self.without(lengths, width, keep_packed=True):
                model(**batch, **_no_cache(model))
                self.keeps = True
            if self.keeps and not comparing:
                return None
            padded = model(**batch, **_no_cache(model))
            with self.without(lengths, width):
                packed = model(**batch, **_no_cache(model))
        except Exception as error:  # whatever a model of any kind raises when its rows are gone
            return in_a_sentence(error, "packed rows")
        finally:
            model.train(training)
        if not comparing:
            return None
        limit = 1e-3 if _dtype(model) == torch.float32 else 0.2
        for expected, found in zip(_said(padded, mask), _said(packed, mask), strict=True):
            off = float((expected - found).abs().max()) / (float(expected.std()) + 1e-6)
            if not off <= limit:
                return f"packed rows give other results than padded ones (by {off:.1g} of their spread)"
        return None


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The model's stack of layers.

    Raises:
        NotPackableError: There is none, or more than one.
    """
    stacks = [
        m
        for m in backbone(model).modules()
        if isinstance(m, nn.ModuleList) and len(m) and all(isinstance(c, GradientCheckpointingLayer) for c in m)
    ]
    if len(stacks) != 1:
        raise NotPackableError(f"{type(model).__name__} has {len(stacks)} stacks of layers, and one is wanted")
    return list(stacks[0])


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' attention modules call: (1, H, T, K) in, (1, T, H, K) out."""
    if not isinstance(attention_mask, Layout):
        raise NotPackableError(f"{type(module).__name__} lost the layout on the way")
    if wanted := [name for name in UNKNOWN if kwargs.get(name) is not None]:
        raise NotPackableError(f"{type(module).__name__} wants {wanted[0]}")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if sliding_window is not None and not causal:  # a window to both sides; a trial of short rows would not show it
        raise NotPackableError(f"{type(module).__name__} has a window to both sides")
    out = packed_attention(
        query,
        key,
        value,
        attention_mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=causal,
        window=sliding_window,
        dropout_p=dropout,
    )
    return out, None


def _is_bloom(module: nn.Module) -> bool:
    return type(module).__name__ == "BloomAttention"


def _bloom_attention(
    module: Any,
    own_forward: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Any,
    layer_past: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """BloomAttention.forward, by sequence; its own where the batch is padded."""
    if not isinstance(attention_mask, Layout):
        return own_forward(hidden_states, residual, alibi, attention_mask, layer_past=layer_past, **kwargs)
    q, k, v = module._reshape(module.query_key_value(hidden_states))
    if layer_past is not None:
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


def _said(output: Any, mask: Tensor) -> list[Tensor]:
    """What the model says, of real tokens where it speaks of tokens: what a padded place says is nobody's."""
    if hasattr(output, "start_logits"):  # each (S, W)
        return [_of_tokens(output.start_logits, mask), _of_tokens(output.end_logits, mask)]
    first = (output[0] if not hasattr(output, "logits") else output.logits).float().cpu()
    return [_of_tokens(first, mask) if first.dim() == 3 and first.shape[1] >= mask.shape[1] else first]


def _of_tokens(values: Tensor, mask: Tensor) -> Tensor:
    return values.float().cpu()[:, values.shape[1] - mask.shape[1] :][mask]  # behind virtual tokens


def in_a_sentence(error: Exception, what: str) -> str:
    """Why a trial failed, for someone who does not know the model's code: what, and behind it the error's own words."""
    if isinstance(error, NotPackableError):
        return str(error)
    words = shortened(first_line(error, kind=True), LONGEST_REASON, " ...")
    return f"this model cannot run {what} ({words})"


def _no_cache(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if getattr(getattr(model, "config", None), "is_decoder", False) else {}


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p for p in model.parameters() if p.is_floating_point()).dtype
