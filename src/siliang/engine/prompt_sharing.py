"""Whether the model may compute the beginning of all prompts of a batch once (`prompts.py`), and how it does.

`generate` asks the model for the inputs of its first forward pass. There the beginning is computed in a batch of one
row, and its keys and values go in front of those of all rows. A trial on the model decides whether the results are the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from siliang.adapters.active_rows import active_rows, looks_ahead
from siliang.capabilities import why_missing
from siliang.engine.padding import NotPackableError, dtype_of, trial_error
from siliang.engine.patches import replace_method
from siliang.engine.prompts import PromptBatch, padded_prompts, prompt_batches
from siliang.language import Bilingual
from siliang.models.introspect import cache_in, is_encoder_decoder, sliding_window
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

_reasons = WeakKeyDictionary[nn.Module, dict[object, str | None]]()  # of each model, by what is active in it


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
        copies: So many times the model computes each prompt, as beams do.
    """
    apart = partial(prompt_batches, prompts, size, copies=copies)
    if not share:
        return apart()
    window = smallest_window(base_of(model))
    longest = None if window is None else max(window - new_tokens - _virtual_tokens(model), 0)
    found = apart(longest_shared=longest)
    return found if not any(batch.common for batch in found) or why_apart(model, pad) is None else apart()


@contextmanager
def beginning_once(model: nn.Module, common: int) -> Iterator[None]:
    """Within the block `generate` computes the first columns of a batch once.

    Args:
        common: The number of these columns, which are the same in all rows, without padding; 0 for none.
    """
    if not common:
        yield
        return
    base = base_of(model)
    own = base.prepare_inputs_for_generation
    undo = replace_method(base, "prepare_inputs_for_generation", update_wrapper(partial(_prepare, base, own, common), own))
    try:
        yield
    finally:
        undo()


class SharedLayer(DynamicLayer):
    """A layer's keys and values behind a beginning that all rows share, which is kept once.

    Shapes: B rows, C common tokens, N others, G heads, K head size.
    """

    is_croppable = False

    def __init__(self, beginning: DynamicLayer) -> None:
        """
        Args:
            beginning: The keys and values of the beginning, (1, G, C, K).
        """
        super().__init__()
        assert beginning.keys is not None and beginning.values is not None
        self.beginning = beginning.keys, beginning.values
        self.lazy_initialization(*self.beginning)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to, each (B, G, C + N, K)."""
        k, v = super().update(key_states, value_states, *args, **kwargs)
        return _behind(self.beginning[0], k), _behind(self.beginning[1], v)

    def get_seq_length(self) -> int:
        return self.beginning[0].shape[2] + super().get_seq_length()


def smallest_window(base: nn.Module) -> int | None:
    """The fewest tokens that an attention of the model looks back at; None if all look at all."""
    config = base.config.get_text_config() if isinstance(base, PreTrainedModel) else None
    windows = [getattr(config, name, None) for name in WINDOWS]
    windows += [sliding_window(module) for module in base.modules()]
    return min((w for w in windows if isinstance(w, int) and w > 0), default=None)


def why_apart(model: nn.Module, pad: int) -> str | None:
    """Why the prompts of a batch are computed apart; None if they may share their beginning.

    Args:
        model: In eval mode.
        pad: The token of the padding.
    """
    base = base_of(model)
    state: object = None
    if isinstance(model, PeftModel):
        state = (tuple(model.injection.active), model.injection.is_disabled)
    known = _reasons.setdefault(base, {})
    if state not in known:
        known[state] = _why_apart(model, base, pad)
    return known[state]


def base_of(model: nn.Module) -> PreTrainedModel:
    """The model that writes."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base


def _why_apart(model: nn.Module, base: PreTrainedModel, pad: int) -> str | None:
    if (missing := why_missing("shared beginnings of prompts")) is not None:
        return missing
    if is_encoder_decoder(base):
        return Bilingual("an encoder sees later tokens", "编码器能看到后面的词元")
    if isinstance(model, PeftModel) and not model.injection.is_disabled:
        if (readers := active_rows(model.injection)):
            setting = readers[0].setting
            return Bilingual(f"{setting} computes each row in its own way", f"{setting} 对每条样本的计算各不相同")
        if (why := looks_ahead(model.injection)) is not None:
            return why
    settings = base.generation_config
    if (reads := [name for name in READS_ORDER if getattr(settings, name, None)]):
        return Bilingual(
            f"the model's generation_config sets {reads[0]}, which reads the tokens in their order",
            f"模型的 generation_config 设置了 {reads[0]}，它按顺序读取词元",
        )
    try:
        layers = DynamicCache(config=base.config.get_text_config(decoder=True)).layers
        if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
            return Bilingual(
                "it has layers that keep no keys and values of each token", "其中有些层不保存每个词元的键和值"
            )
        off = _trial(base, pad)
    except Exception as error:  # a model may raise any exception
        return trial_error(error, Bilingual("shared beginnings", "共用开头的样本"))
    if off is None:
        return None
    return Bilingual(
        f"they give other results than separate rows (by {off:.1g} of their spread)",
        f"与逐条计算的结果不同（相差标准差的 {off:.1g} 倍）",
    )


@torch.no_grad()
def _trial(base: PreTrainedModel, pad: int) -> float | None:
    """How far the logits of three new tokens differ for two prompts, relative to their spread, if they share their
    first three tokens; None if that is rounding."""
    embeddings: Any = base.get_input_embeddings()
    ends: Any = base.generation_config.eos_token_id
    ends = {pad, *(ends if isinstance(ends, list) else [ends])}
    vocabulary = int(embeddings.weight.shape[0])
    letters = [i for n in range(64) if (i := (5 + 7 * n) % vocabulary) not in ends][:9]
    a, b, c, d, e, f, *new = letters
    prompts, common = [[a, b, c, d, e, f], [a, b, c, e]], 3

    def next_token(row: int, ids: Tensor) -> list[int]:
        return [new[(row + len(ids)) % len(new)]]

    options: dict[str, Any] = {
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
            with beginning_once(base, shared):
                output = base.generate(**{name: x.to(base.device) for name, x in batch.items()}, **options)
            found.append(torch.stack(output.logits).float())
    apart, together = found
    limit = 1e-3 if dtype_of(base) == torch.float32 else 0.2
    off = float((apart - together).abs().max()) / (float(apart.std()) + 1e-6)
    return None if off <= limit else off


def _prepare(
    base: PreTrainedModel,
    own: Callable[..., dict[str, Any]],
    common: int,
    input_ids: Tensor,
    next_sequence_length: int | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """prepare_inputs_for_generation. Before the first forward pass, it computes the beginning and leaves it to that
    pass to compute the rest."""
    if kwargs.get("is_first_iteration"):
        cache = cache_in(kwargs)
        if not isinstance(cache, DynamicCache) or cache.get_seq_length():
            raise NotPackableError(
                Bilingual("it keeps no keys and values of earlier tokens", "它不保存前面词元的键和值")
            )
        begin = kwargs | {"attention_mask": torch.ones_like(input_ids[:1, :common])}
        if (positions := kwargs.get("position_ids")) is not None:
            begin["position_ids"] = positions[..., :1, :common]
        base(**own(input_ids[:1, :common], **begin), return_dict=True)
        cache.layers = [SharedLayer(layer) for layer in cache.layers if isinstance(layer, DynamicLayer)]
        next_sequence_length = input_ids.shape[1] - common
    return own(input_ids, next_sequence_length=next_sequence_length, **kwargs)


def _behind(beginning_1GCK: Tensor, own_BGNK: Tensor) -> Tensor:
    return torch.cat([beginning_1GCK.expand(len(own_BGNK), -1, -1, -1), own_BGNK], 2)


def _virtual_tokens(model: nn.Module) -> int:
    """The virtual tokens in front of each row."""
    configs = model.peft_config.values() if isinstance(model, PeftModel) else ()
    return sum(getattr(config, "num_virtual_tokens", None) or 0 for config in configs)
