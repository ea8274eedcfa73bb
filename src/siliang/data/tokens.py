"""Examples to tokens and labels: one function a task, in parallel and cached where the data is large."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from siliang.config import DataConfig
from siliang.data.cache import cache_folder, prune, used
from siliang.data.chat import ChatTemplate
from siliang.data.encode import IGNORED, Encoder
from siliang.data.entries import BAD, Rows, bad_row, dropped, is_bad, number_of_bad
from siliang.data.examples import (
    Conversation,
    Example,
    ExampleSet,
    Message,
    Prepared,
    Text,
    bad_rows_message,
    from_json,
    texts,
)
from siliang.data.labelled_tokens import classes, sources_and_targets, spans, tags
from siliang.data.templates import Piece, Template, find_template
from siliang.limits import RefusedError, in_time
from siliang.types import DataError, ModelError, TaskType, first_line

if TYPE_CHECKING:  # slow to import
    from datasets import Dataset, Features

CACHED_ROWS = 2_000  # from so many on, tokens are kept in a file
PARALLEL_ROWS = 20_000  # from so many on, several processes tokenise
BATCH = 500
SECONDS, CHARACTERS_A_SECOND = 6.0, 5_000  # for tokens, at the least: any tokenizer makes a hundred times as many

INT, INTS = "a number", "a list of numbers"
COLUMNS = {
    TaskType.CAUSAL_LM: {"input_ids": INTS, "labels": INTS},
    TaskType.SEQ_CLS: {"input_ids": INTS, "token_type_ids": INTS, "labels": INT},
    TaskType.TOKEN_CLS: {
        "input_ids": INTS,
        "labels": INTS,
        "words": INTS,
    },  # of each token with a tag, its word's number
    TaskType.SEQ_2_SEQ_LM: {"input_ids": INTS, "labels": INTS},
    TaskType.QUESTION_ANS: {
        "input_ids": INTS,
        "token_type_ids": INTS,
        "start_positions": INT,
        "end_positions": INT,
        "offsets": INTS,  # two a token: where it begins and ends in the context; -1 outside of it
    },
}
SETTINGS = ("train_on", "max_length", "max_target_length", "stride", "too_long", "long_text")  # that decide on tokens
NOT_FOR_MODEL = ("row", "lost", "lost_answer", "offsets", "words")


class TokenSet(torch.utils.data.Dataset[dict[str, Any]]):
    """Tokenised examples, as the Trainer wants them.

    Attributes:
        table: A column for each model input; `row`, the number of the example (a long context or text gives several
            entries, one a window); `lost` and `lost_answer`, the tokens that truncation took, of everything and of what
            is learned.
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
        from datasets import List

        if "labels" not in self.table.column_names or not isinstance(self.table.features["labels"], List):
            return np.ones(len(self), dtype=np.int64)
        parts = []
        for chunk in self._chunks("labels"):
            values, sizes = chunk.flatten().to_numpy(zero_copy_only=False), _sizes(chunk)
            ends = np.cumsum(sizes)
            total = np.concatenate([[0], np.cumsum(values != IGNORED)])
            parts.append(total[ends] - total[ends - sizes])
        return np.concatenate(parts or [np.zeros(0, np.int64)])

    @cached_property
    def last_windows(self) -> np.ndarray:
        """Whether each entry is the last one of its example."""
        rows = self.column("row")
        return np.append(rows[:-1] != rows[1:], True) if len(rows) else np.zeros(0, bool)

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
    judged: bool = True,
) -> TokenSet:
    """Tokens and labels of each example, at most `data.max_length` of them.

    A conversation that is too long loses its oldest rounds first, then the beginning of its question and the end of its
    answer, never its first token, its system message where that leaves room, or the end-of-sequence token. A plain text
    that is too long becomes windows (`data.long_text`).

    Args:
        labels: The classes' or tags' names, by number.
        keep_going: Examples that cannot be used do not stop, whatever the settings say.
        judged: Examples without tokens to speak of, or most of whose tokens are unknown, cannot be used. False where
            nothing is learned from them.

    Raises:
        DataError: An example cannot be used and `skip_bad_rows` is off, or not one can.
        ConfigError: The tokenizer has no end-of-sequence token, and the model is to write text.
    """
    work = _worker(tokenizer, data, task, labels)
    if not isinstance(examples, ExampleSet):
        examples = ExampleSet.build((f"row {i}", e) for i, e in enumerate(examples, start=1))
    features = _features(task)
    if not len(examples):
        from datasets import Dataset

        made = Dataset.from_dict({name: [] for name in features}, features=features)
        return TokenSet(made.remove_columns(BAD))
    judge = _Judge.of(tokenizer, task) if judged else None
    table = _map(
        examples,
        partial(_batch, work, judge, list(features)),
        features,
        _key(examples, tokenizer, data, task, labels, judged),
        data,
    )
    found = table.select_columns(["row", BAD]).filter(is_bad, input_columns="row")
    bad = [f"{examples.where(number_of_bad(row))} {why}" for row, why in zip(found["row"], found[BAD], strict=True)]
    table = table.remove_columns(BAD)
    kept = table.filter(lambda row: row >= 0, input_columns="row") if bad or data.too_long == "drop" else table
    too_long = len(table) - len(kept) - len(bad)
    if data.skip_bad_rows:
        kept, more = _without_lessons(kept, examples)
        bad += more
    if bad and not (keep_going or (data.skip_bad_rows and len(kept))):
        raise DataError(bad_rows_message(bad))
    return TokenSet(kept, too_long, skipped=bad)


def _features(task: TaskType) -> Features:
    """The columns of the table of tokens."""
    from datasets import Features, List, Value

    int32 = Value("int32")
    columns: dict[str, Any] = {name: List(int32) if kind == INTS else int32 for name, kind in COLUMNS[task].items()}
    return Features({**columns, "row": int32, "lost": int32, "lost_answer": int32, BAD: Value("string")})


def _without_lessons(table: Dataset, examples: ExampleSet) -> tuple[Dataset, list[str]]:
    """The entries that carry a label, and the others by place: an answer that was cut off whole teaches nothing."""
    learned = TokenSet(table).learned
    if learned.all():
        return table, []
    numbers = TokenSet(table).column("row")
    bad = [f"{examples.where(int(numbers[i]))} carries no label" for i in np.flatnonzero(learned == 0)]
    return table.select(np.flatnonzero(learned)), bad


def usable(examples: ExampleSet, tokens: TokenSet) -> tuple[ExampleSet, TokenSet]:
    """The examples without those that were skipped, and their tokens with the new numbers."""
    if not tokens.skipped:
        return examples, tokens
    kept, numbers = np.unique(tokens.column("row"), return_inverse=True)
    features = tokens.table.features
    table = tokens.table.remove_columns("row").add_column("row", numbers.tolist(), feature=features["row"])  # type: ignore[call-arg]
    return examples.select(kept.tolist()), TokenSet(table, tokens.dropped, skipped=tokens.skipped)


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


def _batch(
    work: Worker, judge: _Judge | None, names: list[str], batch: dict[str, list[Any]], numbers: list[int]
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in names}
    examples = [from_json(line) for line in batch["example"]]
    try:
        made = _in_time(work, examples)
    except DataError:  # of one of them: each by itself
        made = [_alone(work, example) for example in examples]
    for number, example, entries in zip(numbers, examples, made, strict=True):
        if judge is not None and (problem := judge.problem(example, entries)):
            entries = [{"input_ids": [], BAD: problem}]
        for entry in entries:
            row = {"row": number, "lost": 0, "lost_answer": 0} | entry
            if BAD in entry:
                row["row"] = bad_row(number)
            for name in names:
                columns[name].append(row.get(name))
    return columns


def _in_time(work: Worker, examples: Sequence[Any]) -> list[Rows]:
    """The entries of each example; a tokenizer's patterns may be a stranger's, and some take for ever on some texts.

    Raises:
        ModelError: The tokenizer takes too long for them, or gives up.
    """
    characters = sum(len(part) for example in examples for part in texts(example))
    try:
        return in_time(partial(work, examples), SECONDS + characters / CHARACTERS_A_SECOND)
    except RefusedError as error:
        where = (
            f"{len(examples)} texts of {characters:,} characters" if len(examples) > 1 else f"{characters:,} characters"
        )
        raise ModelError(f"the model's tokenizer cannot read {where}: {first_line(str(error))}.") from None


def _alone(work: Worker, example: Any) -> list[dict[str, Any]]:
    try:
        return _in_time(work, [example])[0]
    except DataError as error:
        return [{"input_ids": [], BAD: str(error)}]


@dataclass(frozen=True)
class _Judge:
    """Whether the tokens of an example are any use.

    Attributes:
        unknown: The token of everything that the tokenizer does not know; None where it knows all.
        special: Tokens that say nothing of the text.
        predicts: The model learns each token from those before it.
    """

    tokenizer: Any
    unknown: int | None
    special: frozenset[int]
    predicts: bool

    @classmethod
    def of(cls, tokenizer: Any, task: TaskType) -> _Judge:
        unknown, special = tokenizer.unk_token_id, set(tokenizer.all_special_ids)
        if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id):
            unknown = None  # GPT-2 calls its end of sequence so, and has no unknown token
        special.discard(unknown)
        return cls(tokenizer, unknown, frozenset(special), task is TaskType.CAUSAL_LM)

    def problem(self, example: Example, entries: list[dict[str, Any]]) -> str | None:
        """What is wrong with an example; None where nothing is."""
        if entries and (entries[0].get("row", 0) < 0 or BAD in entries[0]):
            return None
        ids = [token for entry in entries for token in entry["input_ids"]]
        if self.predicts and len(ids) < 2:
            return (
                f"becomes {len(ids)} token{'' if len(ids) == 1 else 's'}, and a token is learned from those before it"
            )
        if not self.predicts and self.special.issuperset(ids):
            return "becomes no token but special ones: the tokenizer makes nothing of its text"
        if self.unknown is None or self.unknown not in ids:
            return None
        words = ids
        if parts := texts(example):  # what the template adds is not the row's
            coded = self.tokenizer(parts, add_special_tokens=False, split_special_tokens=True, verbose=False)
            words = [token for part in coded["input_ids"] for token in part]
        n = words.count(self.unknown)
        if n == len(words) or (self._mostly_unknown(ids) and self._mostly_unknown(words)):
            return f"is not in the tokenizer's vocabulary: {n:,} of its {len(words):,} tokens are unknown"
        return None

    def _mostly_unknown(self, ids: list[int]) -> bool:
        return 2 * ids.count(self.unknown) > sum(token not in self.special for token in ids)  # type: ignore[arg-type]


def _map(examples: ExampleSet, function: Any, features: Features, key: str, data: DataConfig) -> Dataset:
    from datasets import disable_progress_bars, enable_progress_bars

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
        with _terminable() if workers > 1 else nullcontext():
            return _mapped(examples, function, features, key, workers, settings)
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        raise DataError(
            f"one of {workers} processes that tokenise was killed, perhaps because memory was full.\n"
            "Set data.workers=1, or a smaller number than that."
        ) from None


@contextmanager
def _terminable() -> Iterator[None]:
    """Within the block a process that is forked ends at SIGTERM, by which the pool ends its processes. With this
    process's own handler, which may only take note, one that waits for a lock of a killed one would wait for ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        if before is not None:  # None: it was set by other than Python's code
            signal.signal(signal.SIGTERM, before)


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


def _key(
    examples: ExampleSet, tokenizer: Any, data: DataConfig, task: TaskType, labels: list[str] | None, judged: bool
) -> str:
    """What the tokens depend on, as a hash: the examples, the tokenizer, the template, the limits, this code."""
    template = find_template(data.template)
    settings = [
        code_hash(),
        task,
        labels,
        judged,
        repr(template),
        tokenizer_hash(tokenizer),
        *(getattr(data, name) for name in SETTINGS),
    ]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for line in examples.lines():
        digest.update(line.encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()[:40]


@cache
def code_hash(folder: Path = Path(__file__).parent) -> str:
    """Of the code that makes tokens: all of this folder, so that no file is forgotten, and the libraries under it."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(f"{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    for library in ("transformers", "tokenizers", "jinja2"):
        digest.update(f"{library} {version(library)}\0".encode())
    return digest.hexdigest()


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
    encoded = iter(encoder.rows(_write(written, write, data), own_spacing=own_spacing))
    rows: list[Rows] = []
    for example in examples:
        if isinstance(example, Prepared):
            ids, labels = list(example.input_ids), list(example.labels or example.input_ids)
        else:
            ids, labels = next(encoded)
        whole = isinstance(example, Text) or (isinstance(example, Prepared) and labels == ids)
        if len(ids) <= data.max_length:
            rows.append([{"input_ids": ids, "labels": labels}])
        elif data.too_long == "drop":
            rows.append(dropped(labels=[]))
        elif whole and data.long_text == "window":
            rows.append(windows(ids, data.max_length))
        elif isinstance(example, Prepared):
            over, lost = len(ids) - data.max_length, sum(x != IGNORED for x in labels[data.max_length :])
            row = {"input_ids": ids[: data.max_length], "labels": labels[: data.max_length]}
            rows.append([{**row, "lost": over, "lost_answer": lost}])
        else:
            rows.append([_shorten(example, ids, labels, encoder, write, data)])
    return rows


def windows(ids: list[int], limit: int) -> Rows:
    """A text in windows of at most `limit` tokens, which follow on from each other.

    Each but the first begins with the last token of the one before, without a label there, so that every token is
    learned once, the first of a window from the one in front of it.
    """
    rows: Rows = [{"input_ids": ids[:limit], "labels": ids[:limit]}]
    for start in range(limit, len(ids), limit - 1):
        part = ids[start - 1 : start + limit - 1]
        rows.append({"input_ids": part, "labels": [IGNORED, *part[1:]]})
    return rows


def _write(examples: Sequence[Example], write: Template | ChatTemplate, data: DataConfig) -> list[list[Piece]]:
    """The pieces of texts and conversations."""
    talks = [e for e in examples if isinstance(e, Conversation)]
    for talk in talks:
        answers = (m for m in reversed(talk.messages) if m.role == "assistant")
        if data.train_on == "last" and not next(answers).trained:
            raise DataError("marks its last answer as one that is not learned, and data.train_on=last learns only that")
    if isinstance(write, ChatTemplate):
        written = iter(write.pieces_of_all(talks, train_on=data.train_on))
    else:
        written = (write.pieces(talk, train_on=data.train_on) for talk in talks)
    return [_plain(e) if isinstance(e, Text) else next(written) for e in examples]


def _plain(text: Text) -> list[Piece]:
    whole = {"trained": True}
    return [Piece("{start}", **whole), Piece(text.text, data=True, **whole), Piece("{eos}", end=True, **whole)]


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
        (ids, labels), *_ = encoder.rows(_write([example], write, data), own_spacing=isinstance(write, ChatTemplate))
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
