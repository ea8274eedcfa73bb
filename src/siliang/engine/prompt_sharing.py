"""Whether the model may compute the beginning of all prompts of a batch once (`prompts.py`), and how it does.

`generate` asks the model for the inputs of its first forward pass. There the beginning is computed in a batch of one
row, and its keys and values go in front of those of all rows. They are kept once. For the first tokens of the rows they
are copied for each row; for a new token of each row the attention reads them where they are (`ops/shared_keys.py`), in
models that use transformers' attention interface, or copies them again. A trial on the model decides which of it
gives the same results as separate rows.

Shapes: B rows, C common tokens, N others, H query heads, G key and value heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from siliang.adapters.active_rows import active_rows, looks_ahead
from siliang.capabilities import why_missing
from siliang.engine.one_answer import one_plain_answer
from siliang.engine.padding import UNSUPPORTED, NotPackableError, dtype_of, trial_error
from siliang.engine.patches import attention_implementation, register_attention, replace_method
from siliang.engine.prompts import PromptBatch, padded_prompts, prompt_batches
from siliang.engine.splits import mixing
from siliang.language import Bilingual
from siliang.methods.config import PeftConfig
from siliang.models.introspect import cache_in, is_encoder_decoder, layer_number, sliding_window
from siliang.models.positions import longest_alike
from siliang.ops.shared_keys import attention_to_shared
from siliang.peft_api.model import PeftModel

# What of a generation_config reads the order of a prompt's tokens, with padding between them.
READS_ORDER = (
    "no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "watermarking_config",
    "guidance_scale",
    "stop_strings",
)
WINDOWS = ("sliding_window", "window_size", "attention_window", "local_attention", "attention_chunk_size")

ATTENTION = "siliang_shared_keys"


@dataclass(frozen=True)
class PromptSharing:
    """What the trial has shown.

    Attributes:
        why_not: Why the prompts of a batch are computed apart; None if they may share their beginning.
        in_place: The attention of new tokens reads the shared keys where they are.
    """

    why_not: str | None = None
    in_place: bool = False


@dataclass(frozen=True)
class Computing:
    """What computes in a model; equal to another with the same objects.

    Attributes:
        attention: The attention implementation.
        configs: Of the active adapters. They are kept, so that no later one is taken for them.
    """

    attention: str | None
    dtype: torch.dtype
    configs: tuple[PeftConfig, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Computing) and self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash(self._parts())

    def _parts(self) -> tuple[object, ...]:
        return self.attention, self.dtype, *map(id, self.configs)


_tried = WeakKeyDictionary[nn.Module, dict[Computing, PromptSharing]]()  # of each model
_cache: ContextVar[DynamicCache | None] = ContextVar("cache", default=None)  # that the attention reads in place


def batches_of(
    model: nn.Module,
    prompts: Mapping[int, Sequence[int]],
    size: int,
    new_tokens: int,
    *,
    pad: int,
    share: bool = True,
    copies: int = 1,
) -> list[PromptBatch]:
    """The batches of prompts that are answered by this model, which share their beginnings if the model allows it.

    Args:
        size: The most prompts of a batch.
        new_tokens: The most tokens of an answer.
        pad: The token of the padding.
        share: Beginnings may be shared.
        copies: The beams of the search: each prompt is computed once for each.
    """
    apart = partial(prompt_batches, prompts, size, copies=copies)
    if not share:
        return apart()
    most = most_columns(base_of(model))
    longest = None if most is None else max(most - new_tokens - _virtual_tokens(model), 0)
    found = apart(longest_shared=longest)
    shares = any(batch.common for batch in found) and find_prompt_sharing(model, pad).why_not is None
    return found if shares else apart()


def with_common(write: Callable[[int], list[str]], common: int) -> list[str]:
    """What `write` gives for a batch with these first columns computed once, or, if the model turns out to lose them,
    with none."""
    if common:
        try:
            return write(common)
        except NotPackableError:  # the trial's texts were too short to show it
            pass
    return write(0)


@contextmanager
def beginning_once(model: nn.Module, common: int, *, in_place: bool | None = None) -> Iterator[None]:
    """Within the block `generate` computes the first columns of a batch once. The model's `generate` is changed for all
    threads: only one may use the model.

    Args:
        common: The number of these columns, which are the same in all rows, without padding; 0 for none.
        in_place: The attention of new tokens reads them where they are. None: if the model can.
    """
    if not common:
        yield
        return
    base = base_of(model)
    with ExitStack() as stack:
        if in_place is None:
            in_place = _tried.get(model, {}).get(_state(model), PromptSharing()).in_place
        first = PromptInputs(base, common, stack if in_place else None)
        prepare = update_wrapper(partial(first.prepare_inputs), first.own)  # generate reads its parameters
        stack.callback(replace_method(base, "prepare_inputs_for_generation", prepare))
        yield


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


def most_columns(base: PreTrainedModel) -> int | None:
    """The most columns of a batch, answers included, that may have a shared beginning: so many tokens each attention
    looks back at, and rotates as in a shorter text. None for any number."""
    config = base.config.get_text_config()
    limits = [getattr(config, name, None) for name in WINDOWS]
    limits += [sliding_window(m) for m in base.modules() if layer_number(m) is not None]
    limits.append(longest_alike(config))
    return min((n for n in limits if isinstance(n, int) and not isinstance(n, bool) and n > 0), default=None)


def find_prompt_sharing(model: nn.Module, pad: int) -> PromptSharing:
    """Whether the prompts of a batch may share their beginning. A model is tried once, as long as the same adapters
    compute in it.

    Args:
        model: In eval mode.
        pad: The token of the padding.
    """
    base = base_of(model)
    if (why := _known_reason(model, base)) is not None:
        return PromptSharing(why)
    known, state = _tried.setdefault(model, {}), _state(model)
    if state not in known:
        known[state] = _try(base, pad)
    return known[state]


def base_of(model: nn.Module) -> PreTrainedModel:
    """The model that writes."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base


def _state(model: nn.Module) -> Computing:
    base, configs = base_of(model), tuple[PeftConfig, ...]()
    if isinstance(model, PeftModel) and not model.injection.is_disabled:
        configs = tuple(model.peft_config[name] for name in model.injection.active)
    return Computing(base.config._attn_implementation, dtype_of(base), configs)


def _try(base: PreTrainedModel, pad: int) -> PromptSharing:
    register_attention(ATTENTION, attend, masks="sdpa")
    reason: str | None = None
    for in_place in (True, False) if base.config._attn_implementation == "sdpa" else (False,):
        try:
            layers = DynamicCache(config=base.config.get_text_config(decoder=True)).layers
            if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
                no_keys = "it has layers that keep no keys and values of each token"
                return PromptSharing(Bilingual(no_keys, "其中有些层不保存每个词元的键和值"))
            off = _trial(base, pad, in_place=in_place)
        except torch.OutOfMemoryError:  # says nothing of the model
            raise
        except Exception as error:  # a model may raise any exception
            reason = trial_error(error, Bilingual("shared beginnings", "共用开头的样本"))
            continue
        if off is None:
            return PromptSharing(in_place=in_place)
        reason = Bilingual(
            f"they give other results than separate rows (by {off:.1g} of their spread)",
            f"与逐条计算的结果不同（相差标准差的 {off:.1g} 倍）",
        )
    return PromptSharing(reason)


def _known_reason(model: nn.Module, base: PreTrainedModel) -> str | None:
    """Why the prompts are computed apart, as far as it is known before a trial."""
    if (missing := why_missing("shared beginnings of prompts")) is not None:
        return missing
    if is_encoder_decoder(base):
        return Bilingual("an encoder sees later tokens", "编码器能看到后面的词元")
    if isinstance(model, PeftModel) and not model.injection.is_disabled:
        if readers := active_rows(model.injection):
            setting = readers[0].setting
            return Bilingual(f"{setting} computes each row in its own way", f"{setting} 对每条样本的计算各不相同")
        if (why := looks_ahead(model.injection)) is not None:
            return why
        if mixed := mixing(model):
            name = mixed[0]
            return Bilingual(f"{name} takes a mean over the whole padded batch", f"{name} 对整个填充后的批次取平均")
    settings = base.generation_config
    if reads := [name for name in READS_ORDER if getattr(settings, name, None)]:
        return Bilingual(
            f"the model's generation_config sets {reads[0]}, which reads the tokens in their order",
            f"模型的 generation_config 设置了 {reads[0]}，它按顺序读取词元",
        )
    return None


@torch.no_grad()
def _trial(base: PreTrainedModel, pad: int, *, in_place: bool) -> float | None:
    """How far the logits of three new tokens differ for two prompts, relative to their spread, if they share their
    first three tokens; None if that is rounding. The second prompt is padded with 35 columns: a bias that counts them
    then exceeds the roundings of half precision."""
    embeddings: Any = base.get_input_embeddings()
    ends: Any = base.generation_config.eos_token_id
    ends = {pad, *(ends if isinstance(ends, list) else [ends])}
    vocabulary = int(embeddings.weight.shape[0])
    letters = [i for n in range(64) if (i := (5 + 7 * n) % vocabulary) not in ends][:9]
    a, b, c, d, e, f, *new = letters
    prompts, common = [[a, b, c, *[d, e, f] * 12], [a, b, c, e]], 3

    def next_token(row: int, ids: Tensor) -> list[int]:
        return [new[(row + len(ids)) % len(new)]]

    options = one_plain_answer(base) | {
        "max_new_tokens": 3,
        "do_sample": False,
        "num_beams": 1,
        "use_cache": True,
        "pad_token_id": pad,
        "prefix_allowed_tokens_fn": next_token,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    found: list[Tensor] = []
    with torch.autocast(base.device.type, enabled=False):
        for shared in (0, common):
            batch = padded_prompts(prompts, pad, left=True, common=shared)
            with beginning_once(base, shared, in_place=in_place):
                output = cast(Callable[..., Any], base.generate)(
                    **{name: x.to(base.device) for name, x in batch.items()}, **options
                )
            found.append(torch.stack(output.logits).float())
    apart, together = found
    limit = 1e-3 if dtype_of(base) == torch.float32 else 0.2
    off = float((apart - together).abs().max()) / (float(apart.std()) + 1e-6)
    return None if off <= limit else off


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function for transformers' interface: (B, H, N, K) in, (B, N, H, K) out."""
    if wanted := [name for name in UNSUPPORTED if kwargs.get(name) is not None]:
        raise NotPackableError(
            Bilingual(f"{type(module).__name__} wants {wanted[0]}", f"{type(module).__name__} 需要 {wanted[0]}")
        )
    if query.shape[2] > 1:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    cache, number = _cache.get(), layer_number(module)
    layer = None if cache is None or number is None else cache.layers[number]
    if not isinstance(layer, SharedLayer) or key is not layer.keys:
        name = type(module).__name__
        raise NotPackableError(Bilingual(f"{name} lost the shared keys on the way", f"{name} 中途丢失了共用的键"))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention_to_shared(query, key, value, *layer.beginning, attention_mask, scaling=scale), None


def _behind(beginning_1GCK: Tensor, own_BGNK: Tensor) -> Tensor:
    return torch.cat([beginning_1GCK.expand(len(own_BGNK), -1, -1, -1), own_BGNK], 2)


def _virtual_tokens(model: nn.Module) -> int:
    """The virtual tokens in front of each row."""
    configs = model.peft_config.values() if isinstance(model, PeftModel) else ()
    return sum(getattr(config, "num_virtual_tokens", None) or 0 for config in configs)
