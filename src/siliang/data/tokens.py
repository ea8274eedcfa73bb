"""Examples to tokens and labels, in parallel and cached where the data is large."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from siliang.config import DataConfig
from siliang.data.encode import IGNORED
from siliang.data.entries import BAD, Rows, bad_row, is_bad, number_of_bad, reason_of, stored
from siliang.data.example import Example
from siliang.data.example_set import ExampleSet, bad_rows_message
from siliang.data.examples import from_json
from siliang.data.judge import Judge
from siliang.data.map_examples import BATCH, map_examples, map_few
from siliang.data.small_table import SmallTable, TokenColumns
from siliang.data.spec import DataSpec, Encode
from siliang.data.task_column import TASK_IDS
from siliang.data.token_key import key_of
from siliang.language import Bilingual, local, together
from siliang.models.tokenizer import Tokenizer
from siliang.safety.limits import RefusedError, run_in_time
from siliang.types import DataError, ModelError, first_line, message_of

if TYPE_CHECKING:  # slow to import
    import pyarrow as pa
    from datasets import Dataset, Features

    Table = Dataset | SmallTable

CACHED_ROWS = 100  # from so many on, tokens are kept in a file
SECONDS, CHARACTERS_A_SECOND = 6.0, 5_000  # for tokens, at the least: any tokenizer makes a hundred times as many
NO_NUMBERS = np.zeros(0, np.int64)
OWN = ("lost", "lost_answer")  # columns of every table, which no batch holds


class TokenSet(torch.utils.data.Dataset[dict[str, Any]]):
    """Tokenized examples, as a data loader reads them.

    Attributes:
        table: A column for each model input; `row`, the number of the example (a long context or text gives several
            entries, one a window); `lost` and `lost_answer`, the tokens that truncation took, of everything and of what
            is learned.
        spec: The task's, which says what the columns are.
        dropped: Examples left out because they were too long.
        skipped: Examples that could not be made into tokens, or of which nothing is learned, with place and reason.
        numbered: Each entry gives its `row` and its own number, `entry`, too, which say what was in a batch.
    """

    def __init__(
        self, table: Table, spec: DataSpec, dropped: int = 0, *, numbered: bool = False, skipped: Sequence[str] = ()
    ) -> None:
        self.table, self.spec, self.dropped, self.numbered = table, spec, dropped, numbered
        self.skipped = list(skipped)
        hidden = {*OWN, *(name for name, column in spec.columns.items() if column.hidden)}
        hidden |= set() if numbered else {"row"}
        self._inputs = [name for name in table.column_names if name not in hidden]
        self._for_model = table.select_columns(self._inputs)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.__getitems__([i])[0]

    def __getitems__(self, rows: list[int]) -> list[dict[str, Any]]:
        """Several entries at once, which is much faster; the data loader calls it."""
        columns: dict[str, list[Any]] = self._for_model[rows]
        found = [self._clean({name: values[i] for name, values in columns.items()}) for i in range(len(rows))]
        if self.numbered:
            for number, row in zip(rows, found, strict=True):
                row["entry"] = number
        return found

    def hidden(self, rows: list[int]) -> list[dict[str, Any]]:
        """The columns of several entries that no batch holds."""
        names = [*OWN, *(name for name, column in self.spec.columns.items() if column.hidden)]
        columns: dict[str, list[Any]] = self.table.select_columns(names)[rows]
        return [{name: values[i] for name, values in columns.items()} for i in range(len(rows))]

    def _clean(self, row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if value is not None}

    def number(self) -> TokenSet:
        """The same, each entry with its number."""
        return TokenSet(self.table, self.spec, self.dropped, numbered=True, skipped=self.skipped)

    def select(self, rows: Sequence[int]) -> TokenSet:
        """Some of the entries."""
        return TokenSet(self.table.select(rows), self.spec)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each entry."""
        return np.concatenate([sizes for _, sizes in self.pieces("input_ids")] or [NO_NUMBERS])

    def outline(self, i: int) -> dict[str, Any]:
        """The columns that splitting a step into batches needs: the number of tokens, not the tokens."""
        found: dict[str, Any] = {"input_ids": range(int(self.lengths[i]))}
        return found | ({"sequences": self._sequences[i].tolist()} if self.spec.sequences else {})

    @cached_property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each sequence of each entry."""
        return np.concatenate(self._sequences or [np.zeros(0, np.int64)]) if self.spec.sequences else self.lengths

    @property
    def lengths_by_entry(self) -> Iterator[np.ndarray]:
        """Tokens of each sequence, entry by entry."""
        return iter(self._sequences if self.spec.sequences else self.lengths[:, None])

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence; 0 if there is none."""
        return int(self.sequence_lengths.max(initial=0))

    @cached_property
    def _sequences(self) -> list[np.ndarray]:
        return list(self.lists("sequences"))

    @cached_property
    def learned(self) -> np.ndarray:
        """Tokens of each entry that carry a label; 1 where an entry has one label."""
        if not self.spec.label_per_token:
            return np.ones(len(self), dtype=np.int64)
        parts = []
        for values, sizes in self.pieces("labels"):
            ends = np.cumsum(sizes)
            total = np.concatenate([[0], np.cumsum(values != IGNORED)])
            parts.append(total[ends] - total[ends - sizes])
        return np.concatenate(parts or [NO_NUMBERS])

    @property
    def predicted(self) -> int:
        """Labelled tokens that something is in front of, which a loss over next tokens counts."""
        alone = sum(int(labels[0] != IGNORED) for labels in self.lists("labels") if len(labels))
        return int(self.learned.sum()) - alone

    @property
    def truncated(self) -> int:
        """Entries that were cut to max_length."""
        return int((self.column("lost") > 0).sum())

    @cached_property
    def last_windows(self) -> np.ndarray:
        """Whether each entry is the last one of its example."""
        rows = self.column("row")
        return np.append(rows[:-1] != rows[1:], True) if len(rows) else np.zeros(0, bool)

    def lists(self, name: str) -> Iterator[np.ndarray]:
        """The arrays of a column of lists, one an entry."""
        for values, sizes in self.pieces(name):
            yield from np.split(values, np.cumsum(sizes)[:-1])

    def column(self, name: str) -> np.ndarray:
        """A column of numbers."""
        if isinstance(self.table, SmallTable):
            return self.table.numbers(name)
        parts = [chunk.to_numpy(zero_copy_only=False) for chunk in _chunks(self.table, name)]
        return np.concatenate(parts or [NO_NUMBERS])

    def pieces(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A column of lists, piece by piece: its numbers, one list after the other, and how long each list is; 0 where
        there is none."""
        if isinstance(self.table, SmallTable):
            if len(self.table):
                yield self.table.lists(name)
            return
        import pyarrow.compute as pc

        for chunk in _chunks(self.table, name):
            sizes = pc.call_function("list_value_length", [chunk]).fill_null(0).to_numpy(zero_copy_only=False)
            yield chunk.flatten().to_numpy(zero_copy_only=False), sizes


def _chunks(table: Dataset, name: str) -> Iterator[pa.Array]:
    """A column piece by piece: the whole need not fit into memory."""
    batch: pa.Table
    if len(table):
        for batch in table.select_columns([name]).with_format("arrow").iter(batch_size=10_000):
            yield batch[name].combine_chunks()


def tokenize(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    data: DataConfig,
    spec: DataSpec,
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
        keep_going: Examples that cannot be used never stop the tokenization.
        judged: Examples without tokens to speak of, or most of whose tokens are unknown, cannot be used. False where
            nothing is learned from them.

    Raises:
        DataError: An example cannot be used and `skip_bad_rows` is off, or not one can.
        ConfigError: The tokenizer has no end-of-sequence token, and the model is to write text.
    """
    work = spec.encoder(tokenizer, data, labels or [])
    judge = Judge.of(tokenizer, predicts=spec.next_token) if judged else None
    if not isinstance(examples, ExampleSet) and len(examples) > BATCH:
        examples = ExampleSet.build((_nth(i), e) for i, e in enumerate(examples, start=1))
    table: Table
    tasks = data.columns.task_id is not None
    if isinstance(examples, ExampleSet) and len(examples):
        kinds, cached = _kinds(spec, tasks=tasks), len(examples) >= CACHED_ROWS
        key = key_of(examples, tokenizer, data, spec, labels, judged) if cached or not examples.few else ""
        function = partial(_batch, work, judge, list(kinds))
        if examples.few and (data.workers or 1) == 1:
            lists = [name for name, column in spec.table.items() if column.many]
            table = map_few(examples, function, kinds, lists, key, cached=cached)
        else:
            table = map_examples(
                examples,
                function,
                _features(spec, tasks=tasks),
                key,
                data,
                cached=cached,
                one_process=spec.neighbours,
            )
    else:
        table = _small_table(examples, work, judge, spec, tasks=tasks)

    def where(number: int) -> str:
        return examples.where(number) if isinstance(examples, ExampleSet) else _nth(number + 1)

    rows = TokenSet(table, spec).column("row")
    unusable = table.select([i for i in np.flatnonzero(rows < 0).tolist() if is_bad(int(rows[i]))])
    reasons = map(reason_of, unusable[BAD])
    bad: list[str] = [
        together(where(number_of_bad(row)), " ", why) for row, why in zip(unusable["row"], reasons, strict=True)
    ]
    table = table.remove_columns(BAD)
    kept = table.select(np.flatnonzero(rows >= 0).tolist()) if (rows < 0).any() else table
    too_long = len(table) - len(kept) - len(bad)
    if data.skip_bad_rows:
        kept, more = _without_labels(kept, spec, where)
        bad += more
    if bad and not (keep_going or (data.skip_bad_rows and len(kept))):
        raise DataError(bad_rows_message(bad))
    return TokenSet(kept, spec, too_long, skipped=bad)


def _nth(number: int) -> str:
    return f"row {number}"


def _features(spec: DataSpec, *, tasks: bool) -> Features:
    """The columns of the table of tokens."""
    from datasets import Features, List, Value

    columns = {
        name: List(Value(column.kind)) if column.many else Value(column.kind) for name, column in spec.table.items()
    }
    own = {"row": Value("int32"), **{name: Value("int32") for name in OWN}, BAD: Value("string")}
    return Features({**columns, **({TASK_IDS: Value("int32")} if tasks else {}), **own})


def _without_labels(table: Table, spec: DataSpec, where: Callable[[int], str]) -> tuple[Table, list[str]]:
    """The entries that carry a label, and the places of the others, such as one whose answer was cut off whole."""
    learned = TokenSet(table, spec).learned
    if learned.all():
        return table, []
    numbers = TokenSet(table, spec).column("row")
    none = Bilingual("carries no label", "没有标签")
    bad: list[str] = [together(where(int(numbers[i])), " ", none) for i in np.flatnonzero(learned == 0)]
    return table.select(np.flatnonzero(learned).tolist()), bad


def usable(examples: ExampleSet, tokens: TokenSet) -> tuple[ExampleSet, TokenSet]:
    """The examples without those that were skipped, and their tokens with the new numbers."""
    if not tokens.skipped:
        return examples, tokens
    kept, numbers = np.unique(tokens.column("row"), return_inverse=True)
    kind: Any = tokens.table.features["row"]  # each kind of table has its own
    table = tokens.table.remove_columns("row").add_column("row", numbers.tolist(), feature=kind)
    return examples.select(kept.tolist()), TokenSet(table, tokens.spec, tokens.dropped, skipped=tokens.skipped)


def _small_table(
    examples: Sequence[Example], work: Encode, judge: Judge | None, spec: DataSpec, *, tasks: bool
) -> SmallTable:
    """The tokens of a batch of examples."""
    kinds = _kinds(spec, tasks=tasks)
    return SmallTable(_encode(work, judge, list(kinds), examples, range(len(examples))), kinds)


def _kinds(spec: DataSpec, *, tasks: bool) -> dict[str, str]:
    """The columns of the table of tokens, with what a number is."""
    kinds: dict[str, str] = {name: column.kind for name, column in spec.table.items()}
    kinds |= {TASK_IDS: "int32"} if tasks else {}
    return kinds | {"row": "int32", **dict.fromkeys(OWN, "int32"), BAD: "str"}


def _batch(
    work: Encode, judge: Judge | None, names: list[str], batch: dict[str, list[str]], numbers: list[int]
) -> TokenColumns:
    return _encode(work, judge, names, [from_json(line) for line in batch["example"]], numbers)


def encoding(
    tokenizer: Tokenizer, data: DataConfig, spec: DataSpec, labels: list[str] | None
) -> tuple[Callable[[Sequence[Example]], list[list[dict[str, object]]]], dict[str, str]]:
    """What turns examples into the rows of a table of tokens, and the columns of the table with what a number is."""
    work, judge = spec.encoder(tokenizer, data, labels or []), Judge.of(tokenizer, predicts=spec.next_token)

    def encode(examples: Sequence[Example]) -> list[list[dict[str, object]]]:
        return _rows_of_table(work, judge, examples, range(len(examples)))

    kinds = _kinds(spec, tasks=data.columns.task_id is not None)
    return encode, {name: kind for name, kind in kinds.items() if name != BAD}


def _encode(
    work: Encode, judge: Judge | None, names: list[str], examples: Sequence[Example], numbers: Sequence[int]
) -> TokenColumns:
    """A list for each column of the table of tokens."""
    rows = [row for rows in _rows_of_table(work, judge, examples, numbers) for row in rows]
    return {name: [row.get(name) for row in rows] for name in names}


def _rows_of_table(
    work: Encode, judge: Judge | None, examples: Sequence[Example], numbers: Sequence[int]
) -> list[list[dict[str, object]]]:
    """The rows of the table of tokens, by example."""
    if not examples:  # with which a tokenizer ends in an IndexError
        return []
    try:
        made = _in_time(work, examples)
    except DataError:  # of one of them: each by itself, and then those that can be used once more
        made = [_alone(work, example) for example in examples]
        good = [i for i, entries in enumerate(made) if not any(BAD in entry for entry in entries)]
        for i, entries in zip(good, work([examples[i] for i in good]) if good else (), strict=True):
            made[i] = entries
    found: list[list[dict[str, object]]] = []
    for number, example, entries in zip(numbers, examples, made, strict=True):
        if judge is not None and (problem := judge.problem(example, entries)):
            entries = [{"input_ids": [], BAD: stored(problem)}]
        found.append([])
        for entry in entries:
            row: dict[str, object] = {"row": number, TASK_IDS: example.task, "lost": 0, "lost_answer": 0, **entry}
            if BAD in entry:
                row["row"] = bad_row(number)
            found[-1].append(row)
    return found


def _in_time(work: Encode, examples: Sequence[Example]) -> Sequence[Rows]:
    """The entries of each example; a tokenizer's patterns may be a stranger's, and some take for ever on some texts.

    Raises:
        ModelError: The tokenizer takes too long for them, or gives up.
    """
    characters = sum(len(part) for example in examples for part in example.texts)
    try:
        return run_in_time(partial(work, examples), SECONDS + characters / CHARACTERS_A_SECOND)
    except RefusedError as error:
        where = Bilingual(f"{characters:,} characters", f" {characters:,} 个字符")
        if (n := len(examples)) > 1:
            where = Bilingual(f"{n} texts of {characters:,} characters", f" {n} 段文本（{characters:,} 个字符）")
        raise ModelError(
            Bilingual(
                f"the model's tokenizer cannot read {where}: {first_line(error)}.",
                f"模型的分词器无法处理{where.zh}：{local(first_line(error), 'zh')}。",
            )
        ) from None


def _alone(work: Encode, example: Example) -> Rows:
    try:
        return _in_time(work, [example])[0]
    except DataError as error:
        return [{"input_ids": [], BAD: stored(message_of(error))}]
