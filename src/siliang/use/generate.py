"""Text from a trained run that writes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import TextStreamer

from siliang.config import RunConfig
from siliang.data.examples import Conversation, Message, Text
from siliang.engine.written import check_beams, one_plain_answer, positions_of, writing
from siliang.language import Bilingual
from siliang.peft_api.model import PeftModel
from siliang.records import Record
from siliang.run_folder import OpenedRun
from siliang.types import ConfigError, ModelError

NEW_TOKENS = 128  # the default length of an answer


def generate(
    run: OpenedRun,
    instruction: str,
    input: str = "",
    *,
    max_new_tokens: int | None = None,
    up_to: int = NEW_TOKENS,
    temperature: float = 0.0,
    plain: bool | None = None,
    base: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The model's answer to an instruction, in the run's own template.

    Args:
        max_new_tokens: The maximum number of new tokens. None: `up_to`, or fewer if the model has no more positions.
        temperature: 0 for the most probable token each time, higher for more varied text.
        plain: The instruction is the beginning of a text, to be continued without a template. None: as the run was
            trained, without one on plain texts alone.
        base: Ask the base model, without the adapter.
        on_text: Called with each piece of the answer while it is generated.

    Raises:
        ConfigError: The run is a classifier; `base` is set for a fully fine-tuned model; or the prompt with the new
            tokens is longer than the model can read.
    """
    task, tokenizer = run.task, run.tokenizer
    if task.prompt is None:
        raise ConfigError(
            Bilingual(
                f"{run.folder} was not trained to write text: use `siliang predict`.",
                f"{run.folder} 不是生成文本的运行：请用 `siliang predict`。",
            )
        )
    if base and not isinstance(run.model, PeftModel):
        raise ConfigError(
            Bilingual(
                f"{run.folder} was fully tuned: its base model is not inside it any more.",
                f"{run.folder} 是全参数微调：其中已没有基座模型。",
            )
        )
    if not base:
        run.check_task()
    plain = run.record.of_texts if plain is None else plain
    talk = Text(instruction) if plain else Conversation((Message("user", instruction, input),))
    ids, stop = task.prompt(tokenizer, run.config.data, talk)
    if not ids:
        raise ConfigError(
            Bilingual(
                "the tokenizer makes no tokens of this text: there is nothing to answer.",
                "分词器没有从这段文本得到任何词元：没有可回答的内容。",
            )
        )
    max_new_tokens = _room(run, len(ids), max_new_tokens, up_to, base=base)
    input_ids = torch.tensor([ids], device=run.model.device)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": stop,
        "attention_mask": torch.ones_like(input_ids),
    }
    if temperature > 0:
        settings["temperature"] = temperature
    beams = check_beams(run.model, run.config.model)
    embeddings: Any = run.model.get_input_embeddings()
    if (most := int(embeddings.weight.shape[0])) <= max(ids):
        raise ModelError(
            Bilingual(
                f"{run.config.model}: its tokenizer has a token {max(ids):,}, and its model {most:,} tokens.",
                f"{run.config.model}：分词器有编号 {max(ids):,} 的词元，而模型只有 {most:,} 个词元。",
            )
        )
    streams = beams == 1  # they are not known before the end
    if on_text is not None and streams:
        settings["streamer"] = _Pieces(tokenizer, on_text)
    if run.model.generation_config.stop_strings is not None:
        settings["tokenizer"] = tokenizer
    settings |= one_plain_answer(run.model)
    with run.computing(), writing(run.config.model), run.model.disable_adapter() if base else nullcontext():
        written = run.model.generate(input_ids=input_ids, **settings)
    answer = written[0] if task.has_encoder else written[0, len(ids) :]
    text = tokenizer.decode(answer, skip_special_tokens=True)
    if on_text is not None and not streams:
        on_text(text)
    return text


def how_it_is_asked(record: Record) -> Bilingual | None:
    """Says that a run on plain texts continues what it is given; None for other runs."""
    if record.of_texts:
        return Bilingual(
            "it was trained on plain texts, and continues the text without a template",
            "它用纯文本训练，不用模板，直接续写",
        )
    if "text" in record.layouts:
        template = RunConfig.recorded(record.config).data.template
        return Bilingual(
            f"it was trained on plain texts and on conversations, and is asked in the template {template}",
            f"它用纯文本和对话训练，提问使用模板 {template}",
        )
    return None


def _room(run: OpenedRun, tokens: int, wanted: int | None, up_to: int, *, base: bool) -> int:
    """Returns the number of new tokens that fit after the prompt.

    Raises:
        ConfigError: The model has no positions for them, or fewer than one is wanted.
    """
    if wanted is not None and wanted < 1:
        raise ConfigError(
            Bilingual(f"max_new_tokens = {wanted:,} must be 1 or more.", f"max_new_tokens = {wanted:,}：至少为 1。")
        )
    task, positions = run.task, positions_of(run.model, base=base)
    limit, room = positions.reads, None
    if limit is not None and tokens > limit - task.decoder_only:
        raise ConfigError(
            Bilingual(
                f"the prompt has {tokens:,} tokens, and the model has {positions.in_words(limit)}: shorten it.",
                f"提示有 {tokens:,} 个词元，而模型有{positions.in_words(limit).zh}：请缩短提示。",
            )
        )
    if task.has_encoder:
        room = None if positions.writes is None else positions.writes - 1  # one begins the target
    elif limit is not None:
        room = limit - tokens
    if room is not None and wanted is not None and wanted > room:
        raise ConfigError(
            Bilingual(
                f"max_new_tokens = {wanted:,} behind a prompt of {tokens:,} tokens is more than the model's "
                f"{positions.in_words(limit if limit is not None else room)}: at most {room:,} can be written.",
                f"提示有 {tokens:,} 个词元，再加 max_new_tokens = {wanted:,} 就超出了模型的 "
                f"{positions.in_words(limit if limit is not None else room).zh}：最多能生成 {room:,} 个。",
            )
        )
    return wanted if wanted is not None else (up_to if room is None else min(up_to, room))


class _Pieces(TextStreamer):
    """Passes on each piece of an answer as soon as its words are complete."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)
