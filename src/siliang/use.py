"""A trained run at work: classes for texts, text for prompts, metrics on data, and the merged model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import TextStreamer

from siliang.data.collate import PadCollator
from siliang.data.examples import Example, Labelled, SourceTarget, Span, Tagged, bad_rows_message
from siliang.data.formats import BadRow, as_text
from siliang.data.jinja import with_chat_template
from siliang.data.load import Layout, load_examples, load_rows
from siliang.data.sources import Reading, open_source
from siliang.data.text_files import kind_of
from siliang.data.tokens import TokenSet, prompt_tokens, special_prefix, stop_tokens, tokenise, usable
from siliang.data.words import cut_into_words, join_words
from siliang.engine.batches import StepCollator, most_tokens
from siliang.engine.evaluate import Reader, Sums
from siliang.engine.evaluate import evaluate as measure
from siliang.engine.step import LABELS, Engine
from siliang.files import filling
from siliang.merge import MergeProof, merge_with_proof
from siliang.methods.prefix_tuning import PrefixTuningConfig
from siliang.models.positions import Positions
from siliang.models.save import save_model
from siliang.peft_model import PeftModel
from siliang.run_folder import OpenedRun, autocast, claim, find_run, open_trained
from siliang.secrets import HIDDEN, short_repr, shortened
from siliang.train import metrics
from siliang.types import WRITERS, ConfigError, DataError, MergeError, ModelError, TaskType, first_line

PROOF_SAMPLES = 32
# the parts of a row that a task predicts from
ASKED: dict[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("text", "text_pair"),
    TaskType.TOKEN_CLS: ("tokens",),
    TaskType.QUESTION_ANS: ("question", "context"),
}
NEW_TOKENS = 128  # of an answer, where nobody says how long it may be
T = TypeVar("T")
PREDICTED_AT_ONCE = 256  # texts that are tokenised together


@dataclass(frozen=True)
class Prediction:
    """The class of a text, and how sure the model is of it."""

    text: str
    label: str
    probability: float
    pair: str | None = None


def predict(
    run: OpenedRun, texts: Iterable[str | tuple[str, str]], *, batch_size: int | None = None
) -> Iterator[Prediction]:
    """The most probable class of each text, in order.

    Args:
        texts: Where the run was trained on pairs of texts, such pairs, or the two in one with a tab between them. Read
            while they are predicted.
        batch_size: Rows that go through the model at once; None for the run's own.

    Raises:
        ConfigError: The run is no classifier of texts.
        DataError: The run is for pairs, and a text is alone, or a text is longer than the model can read.
    """
    _check_task(run, TaskType.SEQ_CLS)
    for examples, _, found in _predicted(run, (_asked(run, text) for text in texts), batch_size):
        for example, (number, probability) in zip(examples, found.values(), strict=True):
            assert isinstance(example, Labelled)
            yield Prediction(example.text, run.labels[number], probability, example.pair)


def _asked(run: OpenedRun, text: str | tuple[str, str]) -> Labelled:
    if run.record.layout != "sentence-pair":
        return Labelled(text if isinstance(text, str) else "\t".join(text), "")
    parts = text.split("\t") if isinstance(text, str) else text
    if len(parts) != 2 or not all(part.strip() for part in parts):
        first, second = run.record.columns["text"], run.record.columns["text_pair"]
        given = shortened(text, 60)
        raise DataError(
            f"{run.folder} was trained on pairs of texts, {first!r} and {second!r}, and {given!r} has no "
            f"{second!r}.\nGive both with a tab between them, or a file with both columns: siliang predict RUN a.csv."
        )
    return Labelled(parts[0], "", parts[1])


Asked = str | tuple[str, str] | tuple[str, ...]  # a text, a pair of texts, or words


def read_texts(run: OpenedRun, source: str) -> list[Asked]:
    """The texts of a file of data, or the pairs or words, from the columns that the run was trained on; "" where a row
    has none.

    Raises:
        DataError: It cannot be read, or lacks the columns.
    """
    data, task = run.config.data, run.config.task
    reading = Reading(data.header, "auto", data.separator, keeps_empty=True)
    parts = [p for p in ASKED[task] if p != "text_pair" or run.record.layout == "sentence-pair"]
    names = [run.record.columns.get(part, part) for part in parts]
    if kind_of(Path(source)) == ".txt":
        names = ["text"]
    texts: list[Asked] = []
    opened = open_source(source, reading)
    for row in opened.rows(next(iter(opened.parts)), reading):
        missing = [name for name in names if name not in row.values]
        if row.problem is not None:
            raise DataError(f"{row.where} {row.problem}.")
        if missing:
            there = ", ".join(map(repr, row.values))
            raise DataError(f"{row.where} has no column {missing[0]!r}, which the run was trained on; it has {there}.")
        values = [row.values[name] for name in names]
        if task is TaskType.TOKEN_CLS and isinstance(values[0], list):
            texts.append(tuple(map(str, values[0])))
            continue
        try:
            cells = [as_text(value, name) for value, name in zip(values, names, strict=True)]
        except BadRow as problem:
            raise DataError(f"{row.where} {problem}.") from None
        texts.append((cells[0], cells[1]) if len(cells) > 1 and any(map(str.strip, cells)) else cells[0])
    return texts


@dataclass(frozen=True)
class TaggedSpan:
    """A span of words with one tag.

    Attributes:
        words: The number of its first word, and of the word behind its last.
    """

    text: str
    tag: str
    words: tuple[int, int]


@dataclass(frozen=True)
class TaggedWords:
    """A text's words, the tag of each, and the spans that these are."""

    text: str
    words: tuple[str, ...]
    tags: tuple[str, ...]
    spans: tuple[TaggedSpan, ...]


def predict_tags(
    run: OpenedRun, sentences: Iterable[str | Sequence[str]], *, batch_size: int | None = None
) -> Iterator[TaggedWords]:
    """The tag of each word, in order, however long a sentence is: what does not fit into the run's `data.max_length` is
    read in several pieces.

    Args:
        sentences: Words; or a text, which is cut into words at its blanks, and, where a language writes none, into
            characters. Read while they are predicted.
        batch_size: Rows that go through the model at once; None for the run's own.

    Raises:
        ConfigError: The run gives no tags.
    """
    _check_task(run, TaskType.TOKEN_CLS)
    for some in _some(sentences, PREDICTED_AT_ONCE):
        words = [cut_into_words(s) if isinstance(s, str) else tuple(s) for s in some]
        for asked, sentence, tags in zip(some, words, _tags(run, words, batch_size), strict=True):
            text = asked if isinstance(asked, str) else join_words(sentence)
            yield TaggedWords(text, sentence, tags, spans_of(sentence, tags, asked))


def _tags(run: OpenedRun, sentences: list[tuple[str, ...]], batch_size: int | None) -> list[tuple[str, ...]]:
    """A tag for each word: pieces of a sentence are read until all its words have one."""
    outside = "O" if "O" in run.labels else run.labels[0]
    tags: list[list[str | None]] = [[None] * len(s) for s in sentences]
    waiting = [
        (i, 0) for i, sentence in enumerate(sentences) if sentence
    ]  # a sentence, and the first word of its piece
    while waiting:
        pieces = [Tagged(sentences[i][start:], (run.labels[0],) * len(sentences[i][start:])) for i, start in waiting]
        again: list[tuple[int, int]] = []
        read = [
            (tokens, entry, numbers)
            for _, tokens, found in _predicted(run, pieces, batch_size)
            for entry, numbers in found.items()
        ]
        for (i, start), (tokens, entry, numbers) in zip(waiting, read, strict=True):
            places = [start + w for w in tokens.table[entry]["words"]]
            begin = 0 if start == 0 else len(places) // 8  # the first words of a later piece stand without their left
            for k, (place, number) in enumerate(zip(places, numbers, strict=True)):
                if k >= begin or tags[i][place] is None:
                    tags[i][place] = run.labels[number]
            last = places[-1] if places else start
            if tokens.column("lost")[entry] and last + 1 < len(sentences[i]) and places:
                again.append((i, max(start + 1, last + 1 - len(places) // 4)))
        waiting = again
    # a word of which the tokenizer leaves nothing has no tag
    return [tuple(outside if tag is None else tag for tag in row) for row in tags]


@dataclass(frozen=True)
class Answer:
    """The answer to a question; its text is empty where the context has none.

    Attributes:
        begin: Its first character in the context, None where there is no answer; `end` is behind its last.
        probability: Of these words, or of there being no answer.
    """

    question: str
    context: str
    text: str
    begin: int | None
    end: int | None
    probability: float


def predict_answers(
    run: OpenedRun, questions: Iterable[str | tuple[str, str]], *, batch_size: int | None = None
) -> Iterator[Answer]:
    """The words of its context that answer each question, in order; or that there is no answer, where the run has
    learned from questions without one.

    Args:
        questions: (question, context), or the two in one with a tab between them. Read while they are predicted.
        batch_size: Rows that go through the model at once; None for the run's own.

    Raises:
        ConfigError: The run answers no questions.
        DataError: A question has no context, or is longer than the model can read.
    """
    _check_task(run, TaskType.QUESTION_ANS)
    rows = (_question(run, asked) for asked in questions)
    for examples, tokens, found in _predicted(run, rows, batch_size):
        asked = metrics.Rows(tokens, examples, unanswered=run.record.unanswered)
        for example, a in zip(examples, metrics.best_answers(found, asked), strict=True):
            assert isinstance(example, Span)
            yield Answer(example.question, example.context, a.text, a.begin, a.end, a.probability)


def spans_of(words: Sequence[str], tags: Sequence[str], sentence: str | Sequence[str]) -> tuple[TaggedSpan, ...]:
    """The spans that the words' tags make, as seqeval reads them.

    Args:
        sentence: All its words; or the text that was cut into them, from which the spans are taken as they stand.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    spans: list[TaggedSpan] = []
    places = _places(words, sentence) if isinstance(sentence, str) else []
    for tag, first, last in get_entities([metrics.as_iobes(tag) for tag in tags]):
        if isinstance(sentence, str):
            text = sentence[places[first][0] : places[last][1]]
        else:
            text = join_words(words[first : last + 1], sentence)
        spans.append(TaggedSpan(text, tag, (first, last + 1)))
    return tuple(spans)


def _places(words: Sequence[str], text: str) -> list[tuple[int, int]]:
    """Where each word begins and ends in the text that was cut into them."""
    found: list[tuple[int, int]] = []
    end = 0
    for word in words:
        begin = text.index(word, end)
        end = begin + len(word)
        found.append((begin, end))
    return found


def _question(run: OpenedRun, asked: str | tuple[str, str]) -> Span:
    parts = asked.partition("\t")[::2] if isinstance(asked, str) else asked
    if not all(part.strip() for part in parts):
        raise DataError(
            f"{run.folder} answers questions on a context, and {shortened(asked, 60)!r} is not both.\nGive the "
            "question and its context with a tab between them, the context with --context, or a file with both columns."
        )
    return Span(parts[0], parts[1], (), ())


def predict_any(run: OpenedRun, asked: Iterable[Any]) -> Iterator[Any]:
    """What the run's task predicts: of texts their classes or their tags, of questions their answers.

    Raises:
        ConfigError: The run writes text.
    """
    check_predicts(run)
    return PREDICTS[run.config.task](run, asked)


def check_predicts(run: OpenedRun) -> None:
    """
    Raises:
        ConfigError: The run writes text.
    """
    if run.config.task not in PREDICTS:
        raise ConfigError(f"{run.folder} was trained to write text: use `siliang generate`.")


def _check_task(run: OpenedRun, wanted: TaskType) -> None:
    check_predicts(run)
    if run.config.task is not wanted:
        raise ConfigError(
            f"{run.folder} was trained for {run.config.task.lower()}, and this is for {wanted.lower()}: use "
            f"{PREDICTS[run.config.task].__name__}."
        )


PREDICTS: dict[TaskType, Callable[..., Iterator[Any]]] = {
    TaskType.SEQ_CLS: predict,
    TaskType.TOKEN_CLS: predict_tags,
    TaskType.QUESTION_ANS: predict_answers,
}


def _predicted(
    run: OpenedRun, examples: Iterable[Example], batch_size: int | None
) -> Iterator[tuple[list[Example], TokenSet, dict[int, Any]]]:
    """(examples, their tokens, what the model says of each entry), some examples at a time."""
    data = run.config.data.model_copy(update={"too_long": "cut", "skip_bad_rows": False})
    reader = metrics.MEASURES[run.config.task].reader
    with engine_of(run) as engine:
        for some in _some(examples, PREDICTED_AT_ONCE):
            tokens = tokenise(some, run.tokenizer, data, run.config.task, labels=run.labels, judged=False)
            _check_positions(run, tokens, "a text")
            yield some, tokens, sums_of(run, engine, tokens, reader, batch_size).found


def _some(items: Iterable[T], n: int) -> Iterator[list[T]]:
    """At most `n` items at a time."""
    items = iter(items)
    while some := list(islice(items, n)):
        yield some


@contextmanager
def engine_of(run: OpenedRun) -> Iterator[Engine]:
    """The engine with which the run measured in training; off the model again behind the block."""
    # outside of autocast, as in training: what it tries has to come to the same decisions
    engine = Engine(run.model, run.config.task, packing=run.config.train.packing)
    try:
        yield engine
    finally:
        engine.close()


def sums_of(
    run: OpenedRun, engine: Engine, tokens: TokenSet, reader: Reader | None = None, batch_size: int | None = None
) -> Sums:
    """What an evaluation in training adds up, in the same batches."""
    t, device = run.config.train, run.model.device
    collator = StepCollator(
        PadCollator(run.tokenizer.pad_token_id),
        run.config.task,
        batch_size or t.batch_size,
        most_tokens(t.tokens_at_once, device.type, run.precision.dtype),
        packed=engine.padding is not None,
    )
    computing = partial(autocast, run.precision, device)
    return measure(run.model, engine, tokens, collator, reader=reader, autocast=computing)


def generate(
    run: OpenedRun,
    instruction: str,
    input: str = "",
    *,
    max_new_tokens: int | None = None,
    up_to: int = NEW_TOKENS,
    temperature: float = 0.0,
    plain: bool = False,
    base: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """What the model answers to an instruction, in the run's own template.

    Args:
        max_new_tokens: So many tokens may be written. None: `up_to`, or fewer where the model has no more positions.
        temperature: 0 for the most probable token each time, higher for more varied text.
        plain: The instruction is the beginning of a text, to be continued without a template.
        base: Ask the base model, without the adapter.
        on_text: Hears the answer piece by piece while it is written.

    Raises:
        ConfigError: The run is a classifier, or the base of a fully tuned model was asked for; or the prompt, with the
            tokens to be written, is longer than the model can read.
    """
    if run.config.task not in WRITERS:
        raise ConfigError(f"{run.folder} was trained to classify: use `siliang predict`.")
    if base and not isinstance(run.model, PeftModel):
        raise ConfigError(f"{run.folder} was fully tuned: its base model is not inside it any more.")
    tokenizer, template = run.tokenizer, run.config.data.template
    if run.config.task is TaskType.SEQ_2_SEQ_LM:
        ids = tokenizer(f"{instruction}\n{input}".strip() if input else instruction)["input_ids"]
        stop = [tokenizer.eos_token_id]
    elif plain:
        ids = special_prefix(tokenizer) + tokenizer(instruction, add_special_tokens=False)["input_ids"]
        stop = [tokenizer.eos_token_id]
    else:
        ids = prompt_tokens(instruction, tokenizer, template=template, input=input)
        stop = stop_tokens(tokenizer, template=template)
    if not ids:
        raise ConfigError("the tokenizer makes nothing of this text: there is nothing to answer.")
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
    wanted = run.model.generation_config
    if not isinstance(wanted.num_beams or 1, int) or (wanted.num_beams or 1) > MOST_BEAMS:
        asked = short_repr(wanted.num_beams)
        raise ModelError(f"{run.config.model} asks for num_beams = {asked}: at most {MOST_BEAMS}.")
    embeddings: Any = run.model.get_input_embeddings()
    if (most := int(embeddings.weight.shape[0])) <= max(ids):
        raise ModelError(f"{run.config.model}: its tokenizer has a token {max(ids):,}, and its model {most:,} tokens.")
    streams = (wanted.num_beams or 1) == 1  # beams are not known before the end
    if on_text is not None and streams:
        settings["streamer"] = _Pieces(tokenizer, on_text)
    if wanted.stop_strings is not None:
        settings["tokenizer"] = tokenizer
    settings |= _one_plain_answer(run)
    try:
        with run.computing(), run.model.disable_adapter() if base else nullcontext():
            written = run.model.generate(input_ids=input_ids, **settings)
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:  # of a stranger's values
        raise ModelError(
            f"{run.config.model} cannot write: {first_line(error)}\n"
            "Look at its generation_config.json, which says how it writes."
        ) from error
    answer = written[0] if run.config.task is TaskType.SEQ_2_SEQ_LM else written[0, len(ids) :]
    text = tokenizer.decode(answer, skip_special_tokens=True)
    if on_text is not None and not streams:
        on_text(text)
    return text


# What a base model's generation_config may ask for and does not get: several answers, figures beside them, and ways of
# searching that transformers fetches as code from the hub.
ONE_PLAIN_ANSWER: dict[str, Any] = {
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "num_beam_groups": None,
    "diversity_penalty": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    # a cache of another kind, which may be of any size, compiled, or need a card
    "cache_implementation": None,
    "cache_config": None,
    "compile_config": None,
    "disable_compile": True,
    "prefill_chunk_size": None,
}
MOST_BEAMS = 64


def _positions(run: OpenedRun, *, base: bool = False) -> Positions:
    """How long a row may be for the run's model."""
    if not isinstance(run.model, PeftModel):
        return Positions.of(run.model)
    prompts = [] if base else [c for c in run.model.peft_config.values() if c.is_prompt_learning]
    virtual = sum(c.num_virtual_tokens or 0 for c in prompts)  # type: ignore[attr-defined]
    prefix = any(isinstance(c, PrefixTuningConfig) for c in prompts)
    return Positions.of(run.model.get_base_model(), virtual=virtual, prefix=prefix)


def _check_positions(run: OpenedRun, tokens: TokenSet, what: str) -> None:
    """
    Raises:
        DataError: A row is longer than the model can read.
    """
    limit = (positions := _positions(run)).reads
    longest = int(tokens.lengths.max(initial=0))
    if limit is not None and longest > limit:
        raise DataError(
            f"{what} has {longest:,} tokens, and the model has {positions.in_words(limit)}: shorten it, or train with "
            "no larger data.max_length."
        )
    if run.config.task is TaskType.SEQ_2_SEQ_LM and positions.writes is not None:
        longest = int(tokens.learned.max(initial=0))
        if longest > positions.writes:
            raise DataError(
                f"a target has {longest:,} tokens, and the model's decoder {positions.in_words(positions.writes)}: "
                "shorten it, or train with no larger data.max_target_length."
            )


def _room(run: OpenedRun, tokens: int, wanted: int | None, up_to: int, *, base: bool) -> int:
    """Returns the number of new tokens that fit after the prompt.

    Raises:
        ConfigError: The model has no positions for them, or fewer than one is wanted.
    """
    if wanted is not None and wanted < 1:
        raise ConfigError(f"max_new_tokens = {wanted:,} must be 1 or more.")
    positions = _positions(run, base=base)
    limit, room = positions.reads, None
    if limit is not None and tokens > limit - (run.config.task is TaskType.CAUSAL_LM):
        raise ConfigError(
            f"the prompt has {tokens:,} tokens, and the model has {positions.in_words(limit)}: shorten it."
        )
    if run.config.task is TaskType.SEQ_2_SEQ_LM:
        room = None if positions.writes is None else positions.writes - 1  # one begins the target
    elif limit is not None:
        room = limit - tokens
    if room is not None and wanted is not None and wanted > room:
        raise ConfigError(
            f"max_new_tokens = {wanted:,} behind a prompt of {tokens:,} tokens is more than the model's "
            f"{positions.in_words(limit if limit is not None else room)}: at most {room:,} can be written."
        )
    return wanted if wanted is not None else (up_to if room is None else min(up_to, room))


def _one_plain_answer(run: OpenedRun) -> dict[str, Any]:
    wanted = run.model.generation_config
    return {name: value for name, value in ONE_PLAIN_ANSWER.items() if hasattr(wanted, name)}


class _Pieces(TextStreamer):
    """Hands on an answer as soon as its next words are whole."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


def evaluate(run: OpenedRun, data: str | None = None, *, batch_size: int | None = None) -> dict[str, float]:
    """Metrics on the run's held-out rows, or on other data, as they are measured in training and in its precision.

    Args:
        data: A file, or a name on the hub. None: the held-out rows, or, where the run has none, its training rows.
        batch_size: Rows that go through the model at once, which no figure depends on but for rounding; None for the
            run's own.

    Returns:
        rows; loss (mean over rows for classes and answers, over labelled tokens for text and tags); and by task:
        accuracy and f1; f1, precision and recall over spans; perplexity; rouge_l; exact_match and f1. `dropped`, where
        data.too_long = "drop" left out rows.

    Raises:
        DataError: There is no row to measure, or none has a label.
    """
    task = run.config.task
    rows = _rows(run, data)
    with engine_of(run) as engine:
        sums = sums_of(run, engine, rows.tokens, metrics.MEASURES[task].reader, batch_size)
    figures = {"rows": float(len(rows.examples) - rows.tokens.dropped)}
    figures |= {"dropped": float(rows.tokens.dropped)} if rows.tokens.dropped else {}
    figures |= metrics.figures_of(task, sums, rows)
    if task in WRITERS:
        figures["perplexity"] = metrics.perplexity(figures["loss"])
    if task is TaskType.SEQ_2_SEQ_LM:
        figures["rouge_l"] = rouge_l(run, rows, batch_size=batch_size)
    return figures


def rouge_l(run: OpenedRun, rows: metrics.Rows, *, batch_size: int | None = None) -> float:
    """Mean ROUGE-L of what the model writes for the rows' sources, beside their targets."""
    collate = PadCollator(run.tokenizer.pad_token_id)
    size = batch_size or run.config.train.batch_size
    written: list[str] = []
    # rows of like length side by side: less padding, and the longest first shows at once what does not fit
    order = np.argsort(-rows.tokens.lengths, kind="stable").tolist()
    with run.computing():
        for some in _some(order, size):
            batch = {k: x.to(run.model.device) for k, x in collate(rows.tokens.__getitems__(some)).items()}
            ids = run.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=run.config.data.max_target_length,
                do_sample=False,
                **_one_plain_answer(run),
            )
            written += run.tokenizer.batch_decode(ids, skip_special_tokens=True)
    numbers = rows.tokens.column("row")[order].tolist()
    examples = [rows.examples[n] for n in numbers]
    return metrics.rouge_l(written, [e.target for e in examples if isinstance(e, SourceTarget)])


def merge(run: OpenedRun, output: Path, *, data: str | None = None, force: bool = False) -> MergeProof:
    """Merges the run's adapter, proves it on the run's own data, or on `data`, and writes a plain model folder.

    Raises:
        ConfigError: The run has no adapter.
        MergeError: The merged model does not answer as the unmerged one; nothing is left behind, unless `force`.
        OutputError: The output folder is not empty.
    """
    if not isinstance(run.model, PeftModel):
        raise ConfigError(f"{run.folder} was fully tuned: {run.folder / 'model'} is a plain model already.")
    if run.precision.compute != "fp32":  # which would round the sum
        trained = run.trained or find_run(run.folder, force=True)
        run = open_trained(trained, dtype=torch.float32, quantised=False)
    try:
        tokens = _rows(run, data, limit=PROOF_SAMPLES, same=False).tokens
    except DataError as error:
        if data is not None:
            raise
        raise DataError(f"{error}\nThe proof needs some rows, whichever: give them with --data FILE.") from None
    samples = list(_samples(run, tokens))
    new = claim(output)
    try:
        merged, proof = merge_with_proof(run.model, samples)
        if not proof.holds and not force:
            raise MergeError(
                f"The merged model does not answer as the adapter does: {proof}.\n"
                "Nothing was written. Merge in a wider --dtype, or keep it all the same with --force."
            )
        with filling(output) as temporary:
            save_model(temporary, merged, served_tokenizer(run)[0])
    except BaseException:
        if new:
            with suppress(OSError):
                output.rmdir()
        raise
    return proof


def served_tokenizer(run: OpenedRun) -> tuple[Any, str]:
    """The run's tokenizer with the chat template that it was trained with, and which that is, in words."""
    if run.config.task is not TaskType.CAUSAL_LM:
        return run.tokenizer, ""
    return with_chat_template(run.tokenizer, run.config.data.template, run.record.layout)


def _rows(run: OpenedRun, data: str | None, limit: int | None = None, *, same: bool = True) -> metrics.Rows:
    """The rows of `data`, or the run's own held-out rows, or, where it has none, its training rows.

    Args:
        same: They have to be those of the training.

    Raises:
        DataError: There are none, all are longer than data.max_length where these are dropped, or the run's own data is
            not what it was.
    """
    settings, task = run.config.data, run.config.task
    if data is None and same and run.trained is not None:
        run.trained.check_data()
    if data is not None:
        settings = settings.model_copy(update={"labels": run.record.labels, "encoding": "auto"})
        layout = Layout(run.record.layout, run.record.columns) if run.record.layout else None
        rows = load_rows(settings, task, data, layout).eval
    else:
        if any(HIDDEN in label for label in run.labels):  # classes that are secrets have no other names there
            settings = settings.model_copy(update={"labels": run.record.labels})
        examples = load_examples(settings, task, seed=run.config.train.seed)
        rows = examples.eval if len(examples.eval) else examples.train
    rows = rows if limit is None else rows[:limit]
    rows, tokens = usable(rows, tokenise(rows, run.tokenizer, settings, task, labels=run.record.labels))
    if not len(tokens) and tokens.dropped:
        raise DataError(metrics.all_dropped(tokens.dropped, settings.max_length))
    if not len(tokens):
        raise DataError("not one row can be used." + (f" {bad_rows_message(tokens.skipped)}" if tokens.skipped else ""))
    _check_positions(run, tokens, "a row")
    unanswered = run.record.unanswered or metrics.has_unanswered(rows)
    return metrics.Rows(tokens, rows, run.labels, unanswered)


def _samples(run: OpenedRun, tokens: TokenSet) -> Iterator[dict[str, Tensor]]:
    """What the model is called with, one entry at a time."""
    collate, keep = PadCollator(run.tokenizer.pad_token_id), run.config.task is TaskType.SEQ_2_SEQ_LM
    for i in range(min(PROOF_SAMPLES, len(tokens))):
        inputs = collate([tokens[i]])
        yield {k: x.to(run.model.device) for k, x in inputs.items() if keep or k not in LABELS}
