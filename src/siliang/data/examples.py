"""What a row means: a conversation, a text with its class, tagged words, a question on a context, a source and target.

`ExampleSet` holds many of them in an Arrow table: in memory while they are few, in a mapped file when they are many.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from siliang.data.cache import cache_folder, prune

if TYPE_CHECKING:  # half a second of importing that a plan without data does not need
    from datasets import Dataset

Role = Literal["system", "user", "assistant", "tool"]

SPILLED = "rows-"
SPILL_BYTES = 64 * 2**20  # examples beyond this lie in a file


@dataclass(frozen=True)
class Call:
    """A tool that the assistant calls; `arguments` is JSON text, `id` what its answer refers to."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        input: What an Alpaca instruction is about; templates without a place of its own join it to the content.
        calls: The tools called; `content` is usually empty then.
        reasoning: What the assistant thought in front of its answer, where the data keeps it apart from `content`.
        trained: The data wants this answer learned; False where it marks the turn as one that is not.
        name: Of the tool that answers.
        call_id: The `id` of the call that is answered.
    """

    role: Role
    content: str
    input: str = ""
    calls: tuple[Call, ...] = ()
    reasoning: str = ""
    trained: bool = True
    name: str = ""
    call_id: str = ""

    @property
    def text(self) -> str:
        """Content and input in one, as the seeds join them."""
        return f"{self.content}\n{self.input}".strip() if self.input else self.content


@dataclass(frozen=True)
class Conversation:
    """Turns of a user and an assistant, whose words are learned; `tools` is a JSON list of what it may call."""

    messages: tuple[Message, ...]
    tools: str = ""


@dataclass(frozen=True)
class Text:
    """A text that is learned whole."""

    text: str


@dataclass(frozen=True)
class Labelled:
    """A text, or a pair of texts, and the name of its class."""

    text: str
    label: str
    pair: str | None = None


@dataclass(frozen=True)
class Tagged:
    """Words and a tag for each."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Span:
    """A question, and where in its context the answers begin (characters)."""

    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class SourceTarget:
    """A text and what is written from it."""

    source: str
    target: str


@dataclass(frozen=True)
class Prepared:
    """Tokens that were made elsewhere, and their labels; without any, every token is learned."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


Example = Conversation | Text | Labelled | Tagged | Span | SourceTarget | Prepared
KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Conversation, Text, Labelled, Tagged, Span, SourceTarget, Prepared)
}


def conversation(instruction: str, output: str, input: str = "", system: str = "") -> Conversation:
    """A conversation of one question and its answer."""
    start = (Message("system", system),) if system else ()
    return Conversation((*start, Message("user", instruction, input), Message("assistant", output)))


def texts(example: Example) -> list[str]:
    """Every text in an example, for whoever looks for damage."""
    match example:
        case Conversation():
            return [part for m in example.messages for part in (m.content, m.input, m.reasoning) if part]
        case Text():
            return [example.text]
        case Labelled():
            return [example.text] + ([example.pair] if example.pair else [])
        case Tagged():
            return [" ".join(example.tokens)]
        case Span():
            return [example.question, example.context]
        case SourceTarget():
            return [example.source, example.target]
        case Prepared():
            return []


def to_json(example: Example) -> str:
    """An example as one line of JSON, its kind with it."""
    values = dict(vars(example))  # dataclasses.asdict copies deeply, which takes longer than all the rest
    if isinstance(example, Conversation):
        values["messages"] = [{**vars(m), "calls": [vars(c) for c in m.calls]} for m in example.messages]
    return json.dumps([type(example).__name__, values], ensure_ascii=False)


def from_json(line: str) -> Example:
    """The example that `to_json` wrote."""
    kind, values = json.loads(line)
    if kind == "Conversation":
        messages = tuple(Message(**{**m, "calls": tuple(Call(**c) for c in m["calls"])}) for m in values["messages"])
        return Conversation(messages, values["tools"])
    return KINDS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


SHOWN_BAD_ROWS = 5


def bad_rows_message(bad: list[str]) -> str:
    """The first few bad rows, and how to go on without them."""
    more = f"; and {len(bad) - SHOWN_BAD_ROWS:,} more" if len(bad) > SHOWN_BAD_ROWS else ""
    rows = "1 row is bad" if len(bad) == 1 else f"{len(bad):,} rows are bad"
    return (
        f"{rows}: {'; '.join(bad[:SHOWN_BAD_ROWS])}{more}.\nMend them, or leave them out with data.skip_bad_rows=true."
    )


class ExampleSet(Sequence[Example]):
    """Examples in order, each with the place of its row."""

    def __init__(self, table: Dataset, spilled: Sequence[_Spilled] = ()) -> None:
        self.table = table  # columns: example (JSON), where
        self._spilled = tuple(spilled)  # held as long as the rows are

    @classmethod
    def build(cls, items: Iterable[tuple[str, Example]]) -> ExampleSet:
        """From (place, example); what is more than memory should hold goes to files, which go away with the rows."""
        from datasets import Dataset, concatenate_datasets

        parts: list[Dataset] = []
        spilled: list[_Spilled] = []
        lines: list[str] = []
        places: list[str] = []
        held = 0
        for where, example in items:
            line = to_json(example)
            lines.append(line)
            places.append(where)
            held += len(line)
            if held > SPILL_BYTES:
                spilled.append(_Spilled())
                parts.append(spilled[-1].write(lines, places))
                lines, places, held = [], [], 0
        if lines or not parts:
            parts.append(Dataset.from_dict({"example": lines, "where": places}) if lines else _nothing())
        return cls(parts[0] if len(parts) == 1 else concatenate_datasets(parts), spilled)

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> ExampleSet: ...
    def __getitem__(self, i: int | slice) -> Example | ExampleSet:
        if isinstance(i, slice):
            return self.select(range(*i.indices(len(self))))
        return from_json(self.table[i]["example"])

    def __iter__(self) -> Iterator[Example]:
        for batch in self.table.iter(batch_size=1000):
            yield from map(from_json, batch["example"])  # type: ignore[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def lines(self) -> Iterator[str]:
        """The examples as JSON, for hashing."""
        for batch in self.table.iter(batch_size=1000):
            yield from batch["example"]  # type: ignore[index]

    def where(self, i: int) -> str:
        """The place of example `i`."""
        return self.table[i]["where"]

    def select(self, rows: Iterable[int]) -> ExampleSet:
        """Some of the examples, in the order of `rows`; a row may come twice."""
        return ExampleSet(self.table.select(rows), self._spilled)


def _nothing() -> Dataset:
    from datasets import Dataset, Features, Value

    return Dataset.from_dict(
        {"example": [], "where": []}, features=Features({"example": Value("string"), "where": Value("string")})
    )


class _Spilled:
    """A folder in the cache with a file of rows, removed when nobody holds them any more, or when the process ends."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=SPILLED, dir=cache_folder()))
        self._end = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        prune(cache_folder(), SPILLED)  # of processes that were killed

    def write(self, lines: list[str], places: list[str]) -> Dataset:
        import pyarrow as pa
        from datasets import Dataset

        path = self._folder / "rows.arrow"
        table = pa.table({"example": pa.array(lines, pa.string()), "where": pa.array(places, pa.string())})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
        return Dataset.from_file(str(path))
