"""Whether the model may compute the beginning of all prompts of a batch once (`prompts.py`).

A trial on the model decides whether a shared beginning (`shared_cache.py`) gives the same results as separate rows, and
whether the attention may read it in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from siliang.adapters.active_rows import active_rows, looks_ahead
from siliang.capabilities import why_missing
from siliang.engine.one_answer import one_plain_answer
from siliang.engine.padding import NotPackableError
from siliang.engine.patches import register_attention, replace_method
from siliang.engine.prompts import PromptBatch, padded_prompts, prompt_batches
from siliang.engine.shared_cache import ATTENTION, PromptInputs, attend
from siliang.engine.splits import mixing
from siliang.engine.trial import LIMIT, trial_error
from siliang.language import Bilingual
from siliang.methods.config import PeftConfig
from siliang.models.introspect import is_encoder_decoder, layer_number, sliding_window
from siliang.models.positions import longest_alike
from siliang.peft_api.model import PeftModel

# What of a generation_config reads the order of a prompt's tokens, with padding between them.
READS_ORDER = (
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "watermarking_config",
    "guidance_scale",
    "stop_strings",
)
WINDOWS = ("sliding_window", "window_size", "attention_window", "local_attention", "attention_chunk_size")

LIMIT_OF_LOGITS = 0.2  # of the largest difference in half precision, in standard deviations


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
    return Computing(base.config._attn_implementation, base.dtype, configs)


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
    limit = LIMIT if base.dtype == torch.float32 else LIMIT_OF_LOGITS
    off = float((apart - together).abs().max()) / (float(apart.std()) + 1e-6)
    return None if off <= limit else off


def _virtual_tokens(model: nn.Module) -> int:
    """The virtual tokens in front of each row."""
    configs = model.peft_config.values() if isinstance(model, PeftModel) else ()
    return sum(getattr(config, "num_virtual_tokens", None) or 0 for config in configs)
