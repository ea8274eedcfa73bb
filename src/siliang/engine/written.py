"""The texts that a model writes for held-out rows, and the measures of them.

The batches depend on neither the number of ranks nor what else is measured: each rank writes the texts of some whole
batches, so that a text has the same bits on any number of ranks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from siliang.config import EvaluationConfig, RunConfig
from siliang.data.messages import Conversation, Message
from siliang.data.prepared import EvalRows
from siliang.data.task_column import TASK_IDS
from siliang.data.tokens import TokenSet
from siliang.distributed.ranks import Ranks
from siliang.distributed.sharding import is_sharded, reshard
from siliang.engine.batches import in_steps
from siliang.engine.one_answer import check_beams, one_plain_answer, without_padding
from siliang.engine.prompt_sharing import batches_of, beginning_once, with_common
from siliang.engine.prompts import PromptBatch, padded_prompts
from siliang.engine.whole_step import Context
from siliang.language import Bilingual, local
from siliang.models.positions import Positions
from siliang.models.tokenizer import Tokenizer
from siliang.peft_api.model import PeftModel
from siliang.tasks import Task
from siliang.tasks.measures import score_texts
from siliang.tasks.task import HeldOutQuestion
from siliang.types import ConfigError, DataError, ModelError, first_line

ALONE = Ranks()


@dataclass(frozen=True)
class MeasuredTexts:
    """The measures of the texts that a model has written.

    Attributes:
        values: By the name of the measure.
        signatures: How each was computed.
        rows: The number of texts.
    """

    values: Mapping[str, float]
    signatures: Mapping[str, str]
    rows: int


NOTHING = MeasuredTexts({}, {}, 0)


def measure_texts(
    model: Any,
    tokenizer: Tokenizer,
    config: RunConfig,
    task: Task,
    rows: EvalRows,
    *,
    batch_size: int | None = None,
    autocast: Context = nullcontext,
    ranks: Ranks = ALONE,
) -> MeasuredTexts:
    """The task's measures of the texts that the model writes for evaluation.rows held-out rows; nothing for a task
    without measures. Leaves the model in eval mode. Every rank must call this.

    Args:
        model: The model itself, without the wrapper of a distributed strategy.
        batch_size: Texts that are written at once. None: train.batch_size.
        autocast: Returns the context of the computation.

    Raises:
        DataError: No row has an answer that could be compared.
        ConfigError: The model has too few positions for a prompt and the new tokens.
        ModelError: The model's generation_config asks for something that cannot be done.
    """
    if not task.measures:
        return NOTHING
    settings = config.evaluation or EvaluationConfig()
    asked = questions(task, tokenizer, rows, settings.rows)
    new_tokens = room(model, task, asked, config)
    sharded = is_sharded(model)
    options = _options(model, tokenizer, config, task) | {"max_new_tokens": new_tokens, "synced_gpus": sharded}
    assert tokenizer.pad_token_id is not None
    model.eval()
    found = batches_of(
        model,
        {i: question.prompt for i, question in asked.items()},
        batch_size or config.train.batch_size,
        new_tokens,
        pad=tokenizer.pad_token_id,
        share=config.train.share_beginnings and not sharded,  # ranks gather the layers of as many forward passes
        copies=check_beams(model, config.model),
    )
    batches = ranks.from_main(lambda: found)  # the trials of two ranks may differ
    own = batches[ranks.rank :: ranks.size]
    if sharded and len(own) < len(batches[:: ranks.size]):
        own = [*own, PromptBatch(batches[0].numbers[:1])]  # whose layers the other ranks gather
    written: dict[int, str] = {}
    with torch.no_grad(), autocast(), writing(config.model), _gathered(model) if sharded else nullcontext():
        for some in own:
            write = partial(_write, model, tokenizer, task, rows.tokens, asked, some.numbers, options)
            texts = with_common(write, some.common)
            written |= dict(zip(some.numbers, texts, strict=True))
    merged = {entry: text for part in ranks.gather(written) for entry, text in part.items()}
    assert merged.keys() == asked.keys()
    numbers = sorted(merged)
    scores = score_texts(
        task.measures, [merged[i] for i in numbers], [asked[i].reference for i in numbers], settings.bleu_tokenizer
    )
    return MeasuredTexts(
        {name: score.value for name, score in scores.items()},
        {name: score.signature for name, score in scores.items()},
        len(numbers),
    )


def questions(task: Task, tokenizer: Tokenizer, rows: EvalRows, limit: int | None) -> dict[int, HeldOutQuestion]:
    """What the model is to write, by the number of the entry, for so many entries.

    Raises:
        DataError: None of them has an answer.
    """
    assert task.question is not None
    chosen = sample(len(rows.tokens), len(rows.tokens) if limit is None else limit)
    numbers = rows.tokens.column("row")
    found: dict[int, HeldOutQuestion] = {}
    for some in in_steps(chosen, 256):
        inputs, hidden = rows.tokens.__getitems__(list(some)), rows.tokens.hidden(list(some))
        for entry, row, more in zip(some, inputs, hidden, strict=True):
            question = task.question(row | more, rows.examples[int(numbers[entry])], tokenizer)
            if question is not None:
                found[entry] = question
    if not found:
        names = ", ".join(task.measures)
        raise DataError(
            Bilingual(
                f"{names} compare an answer with the right one, and the held-out rows have none: they are texts that "
                "are learned whole. Leave evaluation.measures out, or use rows with a prompt and its answer.",
                f"{names} 把所写的回答与标准答案比较，而验证样本没有答案：它们是整段学习的文本。"
                "请去掉 evaluation.measures，或使用带有提示和答案的样本。",
            )
        )
    return found


def sample(n: int, size: int) -> list[int]:
    """The indices of `size` of `n` rows, sorted; the same for each call."""
    return sorted(random.Random(0).sample(range(n), min(size, n)))


def room(model: nn.Module, task: Task, asked: Mapping[int, HeldOutQuestion], config: RunConfig) -> int:
    """The maximum number of tokens of a text: evaluation.max_new_tokens, or data.max_target_length, or fewer if the
    model has no more positions behind the longest prompt.

    Raises:
        ConfigError: It has fewer than evaluation.max_new_tokens asks for, or none.
    """
    wanted = (config.evaluation or EvaluationConfig()).max_new_tokens
    positions = positions_of(model)
    longest = 0 if task.has_encoder else max(len(question.prompt) for question in asked.values())
    left = room_behind(positions, longest, has_encoder=task.has_encoder)
    if left is None:
        return wanted or config.data.max_target_length
    if (wanted or 1) > left:
        words = positions.in_words(left + longest)
        raise ConfigError(
            Bilingual(
                f"evaluation.max_new_tokens = {wanted or 1:,} behind a prompt of {longest:,} tokens is more than the "
                f"model's {words}: lower evaluation.max_new_tokens or data.max_length.",
                f"提示有 {longest:,} 个词元，再加 evaluation.max_new_tokens = {wanted or 1:,} 就超出了模型的"
                f" {words.zh}：请减小 evaluation.max_new_tokens 或 data.max_length。",
            )
        )
    return wanted or min(config.data.max_target_length, left)


def room_behind(positions: Positions, prompt: int, *, has_encoder: bool) -> int | None:
    """The most tokens that a model with these positions can write behind a prompt of so many; None: any number.

    Args:
        has_encoder: The prompt is the encoder's, and takes none of the positions of what is written.
    """
    if has_encoder:
        return positions.writes  # the last one is not read again, in whose place the start is
    return None if positions.reads is None else positions.reads - prompt


def positions_of(model: nn.Module, *, base: bool = False) -> Positions:
    """The positions that a model has, with its virtual tokens, or, as the base model, without them."""
    if not isinstance(model, PeftModel):
        return Positions.of(model)
    prompts = [] if base else [c for c in model.peft_config.values() if c.is_prompt_learning]
    virtual = sum(c.num_virtual_tokens or 0 for c in prompts)  # type: ignore[attr-defined]
    prefix = any(c.is_prefix for c in prompts)
    return Positions.of(model.get_base_model(), virtual=virtual, prefix=prefix)


@contextmanager
def writing(name: str) -> Iterator[None]:
    """Within the block, what generate refuses is a ModelError: a generation_config may ask for anything.

    Args:
        name: Of the base model.
    """
    try:
        yield
    except (ConfigError, DataError):  # the adapter's own
        raise
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:  # limits for untrusted values
        raise ModelError(
            Bilingual(
                f"{name} cannot write: {first_line(error)}\n"
                "See its generation_config.json: it sets how the model generates text.",
                f"{name} 无法生成：{local(first_line(error), 'zh')}\n"
                "请查看它的 generation_config.json：其中规定了模型如何生成文本。",
            )
        ) from error


def _options(model: Any, tokenizer: Any, config: RunConfig, task: Task) -> dict[str, Any]:
    """The settings of generate without sampling: greedy, or with the beams of the model's generation_config."""
    check_beams(model, config.model)
    options: dict[str, Any] = {"do_sample": False, "use_cache": True, "pad_token_id": tokenizer.pad_token_id}
    options |= one_plain_answer(model)
    if task.decoder_only:
        assert task.prompt is not None
        _, options["eos_token_id"] = task.prompt(tokenizer, config.data, Conversation((Message("user", "a"),)))
    if model.generation_config.stop_strings is not None:
        options["tokenizer"] = tokenizer
    return options


def _write(
    model: Any,
    tokenizer: Any,
    task: Task,
    tokens: TokenSet,
    asked: Mapping[int, HeldOutQuestion],
    entries: Sequence[int],
    options: Mapping[str, Any],
    common: int,
) -> list[str]:
    """The texts for some entries, which are written at once.

    Args:
        common: The first tokens of their prompts that are computed once.
    """
    prompts = [asked[i].prompt for i in entries]
    batch = padded_prompts(prompts, tokenizer.pad_token_id, left=task.decoder_only, common=common)
    width = batch["input_ids"].shape[1]
    rows = tokens.__getitems__(list(entries))
    if TASK_IDS in rows[0] and isinstance(model, PeftModel):
        batch[TASK_IDS] = torch.tensor([row[TASK_IDS] for row in rows])
    device = model.device
    batch = {name: x.to(device) for name, x in batch.items()}
    ends = options.get("eos_token_id", ())
    settings = dict(options) | without_padding(model, batch, ends, decoder_only=task.decoder_only)
    with beginning_once(model, common):
        found = model.generate(**batch, **settings)
    return tokenizer.batch_decode(found[:, width:] if task.decoder_only else found, skip_special_tokens=True)


@contextmanager
def _gathered(model: nn.Module) -> Iterator[None]:
    """Within the block, `generate` gathers a sharded model's embeddings and output layer, as its forward does."""
    assert isinstance(model, FSDPModule)
    register_fsdp_forward_method(model, "generate")
    try:
        yield
    finally:
        model.__dict__.pop("generate", None)
        reshard(model)
