"""How a model computes the beginning of all prompts of a batch once (`prompts.py`).

`generate` asks the model for the inputs of its first forward pass. There the beginning is computed in a batch of one
row, and its keys and values go in front of those of all rows. They are kept once. For the first tokens of the rows they
are copied for each row; for a new token of each row the attention reads them where they are (`ops/shared_keys.py`), in
models that use transformers' attention interface, or copies them again.

Shapes: B rows, C common tokens, N others, H query heads, G key and value heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from siliang.engine.padding import NotPackableError, refuse_unsupported
from siliang.engine.patches import attention_implementation
from siliang.language import Bilingual
from siliang.models.introspect import cache_in, layer_number
from siliang.ops.shared_keys import attention_to_shared

ATTENTION = "siliang_shared_keys"

_cache: ContextVar[DynamicCache | None] = ContextVar("cache", default=None)  # that the attention reads in place


class SharedLayer(DynamicLayer):
    """A layer's keys and values behind a beginning that all rows share, which is kept once."""

    is_croppable = False

    def __init__(self, beginning: DynamicLayer, *, in_place: bool) -> None:
        """
        Args:
            beginning: The keys and values of the beginning, (1, G, C, K).
            in_place: A new token's attention reads them by itself.
        """
        super().__init__()
        assert beginning.keys is not None and beginning.values is not None
        self.beginning, self._in_place = (beginning.keys, beginning.values), in_place
        self.lazy_initialization(*self.beginning)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to: each (B, G, C + N, K), or (B, G, N, K) without those that are read in
        place."""
        k, v = super().update(key_states, value_states, *args, **kwargs)
        if self._in_place and key_states.shape[2] == 1:
            return k, v
        return _behind(self.beginning[0], k), _behind(self.beginning[1], v)

    def get_seq_length(self) -> int:
        return self.beginning[0].shape[2] + super().get_seq_length()


class PromptInputs:
    """The model's inputs for `generate`: the beginning is computed before the first forward pass, which computes the
    rest."""

    def __init__(self, base: PreTrainedModel, common: int, in_place: ExitStack | None) -> None:
        """
        Args:
            in_place: From there on the attention reads the beginning in place, until this is closed; None: never.
        """
        self.own = cast(Callable[..., dict[str, Any]], base.prepare_inputs_for_generation)
        self._base, self._common, self._in_place = base, common, in_place

    def prepare_inputs(
        self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """In place of the model's prepare_inputs_for_generation."""
        if kwargs.get("is_first_iteration"):
            self.compute_beginning(input_ids[:1, : self._common], kwargs)
            next_sequence_length = input_ids.shape[1] - self._common
        return self.own(input_ids, next_sequence_length=next_sequence_length, **kwargs)

    def compute_beginning(self, ids_1C: Tensor, kwargs: Mapping[str, Any]) -> None:
        """Computes the common tokens of all rows into the cache among the arguments."""
        lost = NotPackableError(Bilingual("it keeps no keys and values of earlier tokens", "它不保存前面词元的键和值"))
        cache = cache_in(kwargs)
        if not isinstance(cache, DynamicCache) or cache.get_seq_length():
            raise lost
        given = {**kwargs, "attention_mask": torch.ones_like(ids_1C)}
        if (positions := kwargs.get("position_ids")) is not None:
            given["position_ids"] = positions[..., :1, : self._common]
        self._base(**self.own(ids_1C, **given), return_dict=True)
        if cache.get_seq_length() < self._common:  # virtual tokens may be in front of them
            raise lost
        in_place = self._in_place is not None
        layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
        cache.layers[:] = [SharedLayer(layer, in_place=in_place) for layer in layers]
        if self._in_place is not None:
            self._in_place.enter_context(attention_implementation(self._base.config, ATTENTION))
            self._in_place.callback(_cache.reset, _cache.set(cache))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function for transformers' interface, (B, H, N, K) in, (B, N, H, K) out. The mask has windows."""
    refuse_unsupported(module, kwargs)
    if query.shape[2] > 1:
        known: dict[str, Any] = {"scaling": scaling, "dropout": dropout, "is_causal": is_causal, **kwargs}
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **known)
    cache, number = _cache.get(), layer_number(module)
    layer = None if cache is None or number is None else cache.layers[number]
    if not isinstance(layer, SharedLayer) or key is not layer.keys:
        name = type(module).__name__
        raise NotPackableError(Bilingual(f"{name} changes the keys that it keeps", f"{name} 改动了所保存的键"))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention_to_shared(query, key, value, *layer.beginning, attention_mask, scaling=scale), None


def _behind(beginning_1GCK: Tensor, own_BGNK: Tensor) -> Tensor:
    return torch.cat([beginning_1GCK.expand(len(own_BGNK), -1, -1, -1), own_BGNK], 2)
