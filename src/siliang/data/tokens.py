"""Examples to tokens and labels: one function a task, in parallel and cached where the data is large."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, disable_progress_bars, enable_progress_bars

from siliang.config import DataConfig
from siliang.data.cache import cache_folder, prune, used
from siliang.data.chat import ChatTemplate
from siliang.data.encode import IGNORED, Encoder
from siliang.data.examples import Conversation, Example, ExampleSet, Message, Prepared, Text, from_json
from siliang.data.labelled_tokens import classes, sources_and_targets, spans, tags
from siliang.data.load import bad_rows_message
from siliang.data.templates import Piece, Template, find_template
from siliang.types import DataError, TaskType

CODE_VERSION = 3  # of what this file and those under it compute; raised when the same data gives other tokens
CACHED_ROWS = 2_000  # from so many on, tokens are kept in a file
PARALLEL_ROWS = 20_000  # from so many on, several processes tokenise
BATCH = 500

INTS = List(Value("int32"))
COLUMNS: dict[TaskType, dict[str, Any]] = {
    TaskType.CAUSAL_LM: {"input_ids": INTS, "labels": INTS},
    TaskType.SEQ_CLS: {"input_ids": INTS, "token_type_ids": INTS, "labels": Value("int32")},
    TaskType.TOKEN_CLS: {"input_ids": INTS, "labels": INTS},
    TaskType.SEQ_2_SEQ_LM: {"input_ids": INTS, "labels": INTS},
    TaskType.QUESTION_ANS: {
        "input_ids": INTS,
        "token_type_ids": INTS,
        "start_positions": Value("int32"),
        "end_positions": Value("int32"),
        "offsets": INTS,  # two a token: where it begins and ends in the context; -1 outside of it
    },
}
BAD = "bad"  # the column for what is wrong with an example
NOT_FOR_MODEL = ("row", "lost", "lost_answer", "offsets")


class TokenSet(torch.utils.data.Dataset[dict[str, Any]]):
    """Tokenised examples, as the Trainer wants them.

    Attributes:
        table: A column for each model input; `row`, the number of the example (a long context gives several entries);
            `lost` and `lost_answer`, the tokens that truncation took, of everything and of what is learned.
        dropped: Examples left out because they were too long.
        skipped: Examples that could not be made into tokens, or of which nothing is learned, with place and reason.
        numbered: Each entry gives its `row` too, for whoever wants to know what was in a batch.
    """

    def __init__(
        self, table: Dataset, dropped: int = 0, *, numbered: bool = False, skipped: Sequence[str] = ()
    ) -> None:
        self.table, self.dropped, self.numbered, self.skipped = table, dropped, numbered, list(skipped)
        hidden = [name for name in NOT_FOR_MODEL if not (numbered and name == "row")]
        self._inputs = [name for name in table.column_names if name not in hidden]
        self._for_model = table.select_columns(self._inputs)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self._clean(self._for_model[i])

    def __getitems__(self, rows: list[int]) -> list[dict[str, Any]]:
        """Several at once, which is much quicker; the data loader asks for it."""
        columns: dict[str, list[Any]] = self._for_model[rows]
        return [self._clean({name: values[i] for name, values in columns.items()}) for i in range(len(rows))]

    def _clean(self, row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if value is not None}

    def number(self) -> TokenSet:
        """The same, each entry with its number."""
        return TokenSet(self.table, self.dropped, numbered=True, skipped=self.skipped)

    def select(self, rows: Sequence[int]) -> TokenSet:
        """Some of the entries."""
        return TokenSet(self.table.select(rows))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each entry."""
        return np.concatenate([_sizes(c) for c in self._chunks("input_ids")] or [np.zeros(0, np.int64)])

    @cached_property
    def learned(self) -> np.ndarray:
        """Tokens of each entry that carry a label; for classes and spans 1."""
        if "labels" not in self.table.column_names or not isinstance(self.table.features["labels"], List):
            return np.ones(len(self), dtype=np.int64)
        parts = []
        for chunk in self._chunks("labels"):
            values, sizes = chunk.flatten().to_numpy(zero_copy_only=False), _sizes(chunk)
            ends = np.cumsum(sizes)
            total = np.concatenate([[0], np.cumsum(values != IGNORED)])
            parts.append(total[ends] - total[ends - sizes])
        return np.concatenate(parts or [np.zeros(0, np.int64)])

    def lists(self, name: str) -> Iterator[np.ndarray]:
        """The arrays of a column of lists, one an entry."""
        for chunk in self._chunks(name):
            values, sizes = chunk.flatten().to_numpy(zero_copy_only=False), _sizes(chunk)
            yield from np.split(values, np.cumsum(sizes)[:-1])

    def column(self, name: str) -> np.ndarray:
        """A column of numbers."""
        return np.concatenate([c.to_numpy(zero_copy_only=False) for c in self._chunks(name)] or [np.zeros(0, np.int64)])

    def _chunks(self, name: str) -> Iterator[Any]:
        """A column piece by piece: the whole need not fit into memory."""
        if len(self.table):
            for batch in self.table.select_columns([name]).with_format("arrow").iter(batch_size=10_000):
                yield batch[name].combine_chunks()  # type: ignore[index]


def _sizes(column: Any) -> np.ndarray:
    import pyarrow.compute as pc

    return pc.list_value_length(column).to_numpy(zero_copy_only=False)  # type: ignore[attr-defined]


def tokenise(
    examples: Sequence[Example],
    tokenizer: Any,
    data: DataConfig,
    task: TaskType,
    *,
    labels: list[str] | None = None,
    keep_going: bool = False,
) -> TokenSet:
    """Tokens and labels of each example, at most `data.max_length` of them.

    A conversation that is too long loses its oldest rounds first, then the beginning of its question and the end of its
    answer, never its first token, its system message where that leaves room, or the end-of-sequence token.

    Args:
        labels: The classes' or tags' names, by number.
        keep_going: Examples that cannot be made into tokens do not stop, whatever the settings say.

    Raises:
        DataError: An example cannot be made into tokens and `skip_bad_rows` is off, or not one can.
        ConfigError: The tokenizer has no end-of-sequence token, and the model is to write text.
    """
    work = _worker(tokenizer, data, task, labels)
    if not isinstance(examples, ExampleSet):
        examples = ExampleSet.build((f"row {i}", e) for i, e in enumerate(examples, start=1))
    numbers = {name: Value("int32") for name in ("row", "lost", "lost_answer")}
    features = Features({**COLUMNS[task], **numbers, BAD: Value("string")})
    if not len(examples):
        made = Dataset.from_dict({name: [] for name in features}, features=features)
        return TokenSet(made.remove_columns(BAD))
    table = _map(
        examples, partial(_batch, work, list(features)), features, _key(examples, tokenizer, data, task, labels), data
    )
    found = table.select_columns(["row", BAD]).filter(lambda row: row < -1, input_columns="row")
    bad = [f"{examples.where(-2 - row)} {why}" for row, why in zip(found["row"], found[BAD], strict=True)]
    table = table.remove_columns(BAD)
    kept = table.filter(lambda row: row >= 0, input_columns="row") if bad or data.too_long == "drop" else table
    dropped = len(table) - len(kept) - len(bad)
    if data.skip_bad_rows:
        kept, more = _without_lessons(kept, examples)
        bad += more
    if bad and not (keep_going or (data.skip_bad_rows and len(kept))):
        raise DataError(bad_rows_message(bad))
    return TokenSet(kept, dropped, skipped=bad)


def _without_lessons(table: Dataset, examples: ExampleSet) -> tuple[Dataset, list[str]]:
    """The entries that carry a label, and the others by place: an answer that was cut off whole teaches nothing."""
    learned = TokenSet(table).learned
    if learned.all():
        return table, []
    numbers = TokenSet(table).column("row")
    bad = [f"{examples.where(int(numbers[i]))} carries no label" for i in np.flatnonzero(learned == 0)]
    return table.select(np.flatnonzero(learned)), bad


Rows = list[dict[str, Any]]
Worker = Callable[[Sequence[Any]], list[Rows]]  # for each example its entries


def _worker(tokenizer: Any, data: DataConfig, task: TaskType, labels: list[str] | None) -> Worker:
    encoder = Encoder(tokenizer)
    match task:
        case TaskType.SEQ_CLS:
            return partial(classes, tokenizer, data, labels or [])
        case TaskType.TOKEN_CLS:
            return partial(tags, tokenizer, data, labels or [])
        case TaskType.SEQ_2_SEQ_LM:
            return partial(sources_and_targets, tokenizer, data)
        case TaskType.QUESTION_ANS:
            return partial(spans, tokenizer, data)
        case _:
            encoder.need_eos()
            return partial(_conversations, encoder, writer(data.template, encoder), data)


def _batch(work: Worker, names: list[str], batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in names}
    examples = [from_json(line) for line in batch["example"]]
    try:
        made = work(examples)
    except DataError:
        made = []
        for example in examples:
            try:
                made += work([example])
            except DataError as error:
                made.append([{"input_ids": [], "row": -1, BAD: str(error)}])
    for number, entries in zip(numbers, made, strict=True):
        for entry in entries:
            row = {"row": number, "lost": 0, "lost_answer": 0} | entry
            if BAD in entry:
                row["row"] = -2 - number  # which one: tokens are kept by content, and its place may be another
            for name in names:
                columns[name].append(row.get(name))
    return columns


def _map(examples: ExampleSet, function: Any, features: Features, key: str, data: DataConfig) -> Dataset:
    n = len(examples)
    settings: dict[str, Any] = {}
    if n >= CACHED_ROWS:
        folder = cache_folder() / "tokens"
        folder.mkdir(exist_ok=True)
        used(folder, key)
        prune(folder)
        settings["cache_file_name"] = str(folder / f"{key}.arrow")
    else:
        settings["keep_in_memory"] = True
    workers = data.workers or (max(1, os.cpu_count() or 1) if n >= PARALLEL_ROWS else 1)
    workers = min(workers, max(1, n // BATCH))
    if sys.stderr.isatty() and n >= CACHED_ROWS:
        enable_progress_bars()
    else:
        disable_progress_bars()
    try:
        return _mapped(examples, function, features, key, workers, settings)
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        raise DataError(
            f"one of {workers} processes that tokenise was killed, perhaps because memory was full.\n"
            "Set data.workers=1, or a smaller number than that."
        ) from None


def _mapped(
    examples: ExampleSet, function: Any, features: Features, key: str, workers: int, settings: dict[str, Any]
) -> Dataset:
    return examples.table.map(
        function,
        with_indices=True,
        batched=True,
        batch_size=BATCH,
        remove_columns=examples.table.column_names,
        features=features,
        num_proc=workers if workers > 1 else None,
        new_fingerprint=key,
        desc="tokens",
        **settings,
    )


def _key(examples: ExampleSet, tokenizer: Any, data: DataConfig, task: TaskType, labels: list[str] | None) -> str:
    """What the tokens depend on, as a hash: the examples, the tokenizer, the template, the limits, this code."""
    template = find_template(data.template)
    settings = [
        CODE_VERSION,
        task,
        labels,
        repr(template),
        tokenizer_hash(tokenizer),
        *(getattr(data, name) for name in ("train_on", "max_length", "max_target_length", "stride", "too_long")),
    ]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for line in examples.lines():
        digest.update(line.encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()[:40]


def tokenizer_hash(tokenizer: Any) -> str:
    """Of everything that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inner = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    outer = [
        type(tokenizer).__name__,
        str(tokenizer.special_tokens_map),
        str(getattr(tokenizer, "chat_template", None)),
    ]
    return hashlib.sha256("\0".join([inner, *outer]).encode("utf-8", "surrogatepass")).hexdigest()


# ---- conversations ----


def writer(name: str, encoder: Encoder) -> Template | ChatTemplate:
    """The template of that name, ready to write pieces.

    Raises:
        ConfigError: There is no such template.
        DataError: It is `chat`, and the tokenizer has none.
    """
    return find_template(name) or ChatTemplate(encoder)


def prompt_tokens(question: str | Conversation, tokenizer: Any, *, template: str, input: str = "") -> list[int]:
    """The tokens in front of the assistant's next answer: in training without label, in generation the input."""
    talk = Conversation((Message("user", question, input),)) if isinstance(question, str) else question
    encoder = Encoder(tokenizer)
    write = writer(template, encoder)
    return encoder.prompt(write.pieces(talk, prompt=True), own_spacing=isinstance(write, ChatTemplate))


def stop_tokens(tokenizer: Any, *, template: str) -> list[int]:
    """The tokens that end an answer in this template, and the tokenizer's own end of sequence."""
    encoder = Encoder(tokenizer)
    write = writer(template, encoder)
    # ChatGLM3's answers end with the token of whoever speaks next, and only the last with </s>
    talk = Conversation(
        (Message("user", "a"), Message("assistant", "a"), Message("user", "a"), Message("assistant", "a"))
    )
    (_, labels), *_ = encoder.rows([write.pieces(talk)], own_spacing=isinstance(write, ChatTemplate))
    ends = [a for a, b in zip(labels, [*labels[1:], IGNORED], strict=True) if a != IGNORED and b == IGNORED]
    return list(dict.fromkeys([ends[-1], *ends, encoder.need_eos()]))


def special_prefix(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts in front of every text: Llama's <s>, for BLOOM none."""
    return Encoder(tokenizer).start


def _conversations(
    encoder: Encoder, write: Template | ChatTemplate, data: DataConfig, examples: Sequence[Any]
) -> list[Rows]:
    own_spacing = isinstance(write, ChatTemplate)
    written = [e for e in examples if not isinstance(e, Prepared)]
    encoded = iter(encoder.rows([_write(e, write, data) for e in written], own_spacing=own_spacing))
    rows: list[Rows] = []
    for example in examples:
        if isinstance(example, Prepared):
            ids = list(example.input_ids)
            labels = list(example.labels or ids)
            over = max(0, len(ids) - data.max_length)
            cut = len(ids) - over
            lost = sum(x != IGNORED for x in labels[cut:])
            rows.append([{"input_ids": ids[:cut], "labels": labels[:cut], "lost": over, "lost_answer": lost}])
            continue
        ids, labels = next(encoded)
        if len(ids) <= data.max_length:
            rows.append([{"input_ids": ids, "labels": labels}])
        elif data.too_long == "drop":
            rows.append([{"input_ids": [], "labels": [], "row": -1}])
        else:
            rows.append([_shorten(example, ids, labels, encoder, write, data)])
    return rows


def _write(example: Example, write: Template | ChatTemplate, data: DataConfig) -> list[Piece]:
    if isinstance(example, Text):
        whole = {"trained": True}
        return [Piece("{start}", **whole), Piece(example.text, data=True, **whole), Piece("{eos}", end=True, **whole)]
    assert isinstance(example, Conversation)
    return write.pieces(example, train_on=data.train_on)


def _shorten(
    example: Example,
    ids: list[int],
    labels: list[int],
    encoder: Encoder,
    write: Template | ChatTemplate,
    data: DataConfig,
) -> dict[str, Any]:
    """A row of at most max_length tokens; see `tokenise` for what goes first."""
    before, learned = len(ids), sum(x != IGNORED for x in labels)
    while len(ids) > data.max_length and isinstance(example, Conversation):
        shorter = _without_oldest_round(example)
        if shorter is None:
            break
        example = shorter
        pieces = _write(example, write, data)
        (ids, labels), *_ = encoder.rows([pieces], own_spacing=isinstance(write, ChatTemplate))
    ids, labels = cut_row(ids, labels, data.max_length, len(encoder.start))
    lost = learned - sum(x != IGNORED for x in labels)
    return {"input_ids": ids, "labels": labels, "lost": before - len(ids), "lost_answer": lost}


def _without_oldest_round(talk: Conversation) -> Conversation | None:
    users = [i for i, m in enumerate(talk.messages) if m.role == "user"]
    if len(users) < 2:
        return None
    system = tuple(m for m in talk.messages[: users[0]] if m.role == "system")
    return Conversation((*system, *talk.messages[users[1] :]), talk.tools)


def cut_row(ids: list[int], labels: list[int], limit: int, keep: int = 0) -> tuple[list[int], list[int]]:
    """One question and its answer in at most `limit` tokens.

    The last learned token (the end of sequence) stays; the answer gets at least half of the room, the question loses
    its beginning behind the first `keep` tokens, and what follows the last answer goes.

    Returns:
        (input_ids, labels)
    """
    if len(ids) <= limit:
        return ids, labels
    learned = [i for i, x in enumerate(labels) if x != IGNORED]
    if not learned:
        return ids[:limit], labels[:limit]
    first, last = learned[0], learned[-1] + 1
    prompt, answer, answer_labels = first, ids[first:last], labels[first:last]
    room = max(limit - prompt, min(len(answer), limit // 2))
    if len(answer) > room:
        answer, answer_labels = answer[: room - 1] + answer[-1:], answer_labels[: room - 1] + answer_labels[-1:]
    front = limit - len(answer)
    head = min(keep, prompt, front)
    kept = ids[:head] + ids[prompt - (front - head) : prompt] if front < prompt else ids[:prompt]
    return kept + answer, [IGNORED] * len(kept) + answer_labels


__all__ = ["IGNORED", "TokenSet", "cut_row", "prompt_tokens", "special_prefix", "stop_tokens", "tokenise", "writer"]
