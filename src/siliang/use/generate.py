"""Text from a trained run that writes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from transformers import LogitsProcessorList, StoppingCriteriaList, TextStreamer

from siliang.config import RunConfig
from siliang.data.cells import is_blank
from siliang.data.examples import Text
from siliang.data.messages import Conversation, Message
from siliang.engine.one_answer import check_beams, one_plain_answer, without_padding
from siliang.engine.prompt_sharing import batches_of, beginning_once, with_common
from siliang.engine.prompts import padded_prompts
from siliang.engine.written import positions_of, room_behind, writing
from siliang.language import Bilingual
from siliang.models.positions import trained_length
from siliang.peft_api.model import PeftModel
from siliang.records import Record
from siliang.run_folder import OpenedRun
from siliang.types import ConfigError, ModelError
from siliang.use.sampling import Drawn, Sampling, StopWords

NEW_TOKENS = 128  # the default length of an answer


def generate(
    run: OpenedRun,
    instruction: str,
    input: str = "",
    *,
    system: str = "",
    history: Sequence[Message] = (),
    plain: bool | None = None,
    base: bool = False,
    sampling: Sampling | None = None,
    max_new_tokens: int | None = None,
    up_to: int = NEW_TOKENS,
    temperature: float = 0.0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The model's answer to an instruction, in the run's own template.

    Args:
        system: A system message; white space around it is removed, as in the rows of training.
        history: The turns before the instruction.
        plain: The instruction is the beginning of a text, to be continued without a template. None: as the run was
            trained, without one on plain texts alone.
        base: Ask the base model, without the adapter.
        sampling: How it is written; None: by the following three, which are `Sampling`'s.
        on_text: Called with each piece of the answer while it is generated.

    Raises:
        ConfigError: The run is a classifier; `base` is set for a fully fine-tuned model; or the prompt with the new
            tokens is longer than the model can read.
    """
    asked = as_asked(run, instruction, input, system=system, history=history, plain=plain)
    how = sampling or Sampling(max_new_tokens=max_new_tokens, up_to=up_to, temperature=temperature)
    return write_texts(run, [asked], how, base=base, on_text=on_text)[0]


def as_asked(
    run: OpenedRun,
    instruction: str,
    input: str = "",
    *,
    system: str = "",
    history: Sequence[Message] = (),
    plain: bool | None = None,
) -> Conversation | Text:
    """What a run is asked; the arguments are those of `generate`.

    Raises:
        ConfigError: A text without a template has more than its beginning, or the instruction is blank.
    """
    plain = run.record.of_texts if plain is None else plain
    system = system.strip()  # as that of a row is
    if plain and (unused := "input" if input else "system" if system else "history" if history else None):
        raise ConfigError(
            Bilingual(
                f"{unused} has no place where a text is continued without a template: leave it out, or use --template "
                "(plain=False in Python).",
                f"不用模板直接续写时没有 {unused} 的位置：请去掉，或使用 --template（Python 中为 plain=False）。",
            )
        )
    if not plain and is_blank(instruction) and is_blank(input):
        raise ConfigError(
            Bilingual("the instruction is blank: there is nothing to answer.", "指令为空：没有可回答的内容。")
        )
    turns = (*([Message("system", system)] if system else []), *history, Message("user", instruction, input))
    return Text(instruction) if plain else Conversation(turns)


def write_texts(
    run: OpenedRun,
    asked: Sequence[Conversation | Text],
    sampling: Sampling,
    *,
    numbers: Sequence[int] | None = None,
    places: Sequence[str] = (),
    batch_size: int | None = None,
    base: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """The model's answers to conversations, and what it writes behind texts, in order.

    Args:
        numbers: Of the texts, by which each has random numbers of its own. None: 0, 1, ...
        places: Of the texts, for messages.
        batch_size: Texts that are written at once. None: train.batch_size.
        on_text: Called with each piece of the answer while it is generated; for one text.

    Raises:
        ConfigError: As for `generate`.
    """
    task, tokenizer = run.task, run.tokenizer
    if task.prompt is None:
        raise ConfigError(
            Bilingual(
                f"{run.folder} was not trained to write text: use `siliang predict` (predict in Python).",
                f"{run.folder} 不是生成文本的运行：请用 `siliang predict`（Python 中为 predict）。",
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
    prompts: list[Asked] = []
    embeddings: Any = run.model.get_input_embeddings()
    most = int(embeddings.weight.shape[0])
    for i, (number, one) in enumerate(zip(numbers or range(len(asked)), asked, strict=False)):
        place = f"{places[i]}: " if places else ""
        ids, stop = task.prompt(tokenizer, run.config.data, one)
        if not ids:
            raise ConfigError(
                Bilingual(
                    f"{place}the tokenizer makes no tokens of this text: there is nothing to answer.",
                    f"{place}分词器没有从这段文本得到任何词元：没有可回答的内容。",
                )
            )
        if most <= max(ids):
            raise ModelError(
                Bilingual(
                    f"{run.config.model}: its tokenizer has a token {max(ids):,}, and its model {most:,} tokens.",
                    f"{run.config.model}：分词器有编号 {max(ids):,} 的词元，而模型只有 {most:,} 个词元。",
                )
            )
        new = _room(run, len(ids), sampling.max_new_tokens, sampling.up_to, base=base, place=place)
        prompts.append(Asked(ids, tuple(stop), new, number))
    beams = _beams(run, sampling)
    # texts of one batch have the same limit
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i].new, prompts[i].stop))
    written: dict[int, str] = {}
    with run.computing(), writing(run.config.model), run.model.disable_adapter() if base else nullcontext():
        for (new, _), same in groupby(order, key=lambda i: (prompts[i].new, prompts[i].stop)):
            batches = batches_of(
                run.model,
                {i: prompts[i].ids for i in same},
                batch_size or run.config.train.batch_size,
                new,
                pad=tokenizer.pad_token_id,
                share=run.config.train.share_beginnings,
                copies=beams,
            )
            for some in batches:
                own = [prompts[i] for i in some.numbers]
                texts = with_common(partial(_write, run, own, sampling, beams, on_text), some.common)
                written |= dict(zip(some.numbers, texts, strict=True))
    return [written[i] for i in range(len(prompts))]


class Asked(NamedTuple):
    """The tokens in front of a text, those that end it, how many it may have, and its number."""

    ids: list[int]
    stop: tuple[int, ...]
    new: int
    number: int


def _write(
    run: OpenedRun,
    prompts: Sequence[Asked],
    sampling: Sampling,
    beams: int,
    on_text: Callable[[str], None] | None,
    common: int,
) -> list[str]:
    """The texts behind some prompts, which are written at once.

    Args:
        common: The first tokens of all of them, which are computed once; 0 for none.
    """
    tokenizer, pad = run.tokenizer, run.tokenizer.pad_token_id
    left = run.task.decoder_only
    padded = padded_prompts([p.ids for p in prompts], pad, left=left, common=common)
    batch = {name: x.to(run.model.device) for name, x in padded.items()}
    width = batch["input_ids"].shape[1]
    settings: dict[str, Any] = {
        "max_new_tokens": prompts[0].new,
        "do_sample": False,
        "num_beams": beams,
        "use_cache": True,
        "pad_token_id": pad,
        "eos_token_id": list(prompts[0].stop),
    }
    ends, penalty = prompts[0].stop, sampling.repetition_penalty
    settings |= without_padding(run.model, batch, ends, decoder_only=left, penalty=penalty)
    if sampling.temperature > 0:
        drawn = Drawn(sampling, [p.number for p in prompts])
        settings["logits_processor"] = LogitsProcessorList([*settings.get("logits_processor", ()), drawn])
    start = width if left else 1
    if sampling.stop:
        settings["stopping_criteria"] = StoppingCriteriaList([StopWords(sampling.stop, tokenizer, start)])
    streams = beams == 1  # they are not known before the end
    pieces = None if on_text is None or not streams else _Pieces(tokenizer, on_text, sampling.stop)
    if pieces is not None:
        settings["streamer"] = pieces
    if run.model.generation_config.stop_strings is not None:
        settings["tokenizer"] = tokenizer
    settings |= one_plain_answer(run.model)
    with beginning_once(run.model, common):
        found = run.model.generate(**batch, **settings)
    texts = tokenizer.batch_decode(found[:, width:] if left else found, skip_special_tokens=True)
    texts = [sampling.cut(text) for text in texts]
    if on_text is not None and not streams:
        on_text(texts[0])
    return texts


def _beams(run: OpenedRun, sampling: Sampling) -> int:
    """The beams of a search: those of the model's generation_config, or one where tokens are chosen in another way."""
    beams = check_beams(run.model, run.config.model)
    return 1 if sampling.repetition_penalty is not None or sampling.temperature > 0 or sampling.stop else beams


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


def _room(run: OpenedRun, tokens: int, wanted: int | None, up_to: int, *, base: bool, place: str) -> int:
    """Returns the number of new tokens that fit after the prompt. Warns where the model was not trained for so many.

    Raises:
        ConfigError: The model has no positions for them.
    """
    task, positions = run.task, positions_of(run.model, base=base)
    limit = positions.reads
    if limit is not None and tokens > limit - task.decoder_only:
        raise ConfigError(
            Bilingual(
                f"{place}the prompt has {tokens:,} tokens, and the model has {positions.in_words(limit)}: shorten it.",
                f"{place}提示有 {tokens:,} 个词元，而模型有{positions.in_words(limit).zh}：请缩短提示。",
            )
        )
    room = room_behind(positions, tokens, has_encoder=task.has_encoder)
    if room is not None and wanted is not None and wanted > room:
        words = positions.in_words(room if task.has_encoder else room + tokens)
        raise ConfigError(
            Bilingual(
                f"{place}max_new_tokens = {wanted:,} behind a prompt of {tokens:,} tokens is more than the model's "
                f"{words}: at most {room:,} can be written.",
                f"{place}提示有 {tokens:,} 个词元，再加 max_new_tokens = {wanted:,} 就超出了模型的 "
                f"{words.zh}：最多能生成 {room:,} 个。",
            )
        )
    new = wanted if wanted is not None else (up_to if room is None else min(up_to, room))
    known = trained_length(run.model) if limit is None and not task.has_encoder else None
    if known is not None and tokens + positions.virtual + new > known:
        warnings.warn(  # the same for all texts, so that it is shown once
            Bilingual(
                f"a prompt and its {new:,} new tokens are more than the {known:,} tokens that the model was trained "
                "for: what it writes behind them may be worse.",
                f"提示加上 {new:,} 个新词元超过了模型训练时的 {known:,} 个词元：超出部分的质量可能下降。",
            ),
            stacklevel=2,
        )
    return new


class _Pieces(TextStreamer):
    """Passes on each piece of an answer as soon as its words are complete, up to a stop word."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None], stop: Sequence[str]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text, self._stop = on_text, stop
        self._held, self._ended = "", False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._ended:
            return
        self._held += text
        at = min((at for word in self._stop if (at := self._held.find(word)) >= 0), default=-1)
        if at >= 0:
            shown, self._held, self._ended = self._held[:at], "", True
        else:  # what may be the beginning of a stop word waits
            wait = 0 if stream_end else max((_overlap(self._held, word) for word in self._stop), default=0)
            shown, self._held = self._held[: len(self._held) - wait], self._held[len(self._held) - wait :]
        if shown:
            self._on_text(shown)


def _overlap(text: str, word: str) -> int:
    """The characters at the end of `text` with which `word` may begin."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)
