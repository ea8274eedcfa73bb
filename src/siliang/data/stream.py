"""Rows that are read, encoded and trained in a stream: for data larger than memory and disk.

The entries of the rows make blocks of `data.shuffle_buffer`, in whole optimizer steps; a block's entries are in random
order, as those of an epoch are. Nothing but a block is held. Where a block begins among the rows is all that a resumed
run needs to make it again.

With several sources, each next row comes from the source that is furthest behind its share, so that every stretch of
the stream has all of them in these shares. A source that ends begins anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING

from siliang.config import DataConfig, Source
from siliang.data.entries import BAD, DROPPED, reason_of
from siliang.data.example import Example
from siliang.data.example_reader import ExampleReader
from siliang.data.example_set import ExampleSet, bad_row, bad_rows_message
from siliang.data.small_table import SmallTable, TokenColumns
from siliang.data.spec import DataSpec
from siliang.data.splitting import mixed
from siliang.language import Bilingual
from siliang.models.tokenizer import Tokenizer
from siliang.types import ConfigError, DataError

if TYPE_CHECKING:  # slow to import
    from siliang.data.tokens import TokenSet

CHECKED_ROWS = 2_000  # at the beginning of the stream, of which check and plan know
AT_ONCE = 64  # rows that are encoded together
LISTED = 10_000  # skipped rows


@dataclass
class Position:
    """Where a stream is. Each list has an item a source.

    Attributes:
        passes: Passes that are over.
        rows: Usable rows read in this pass, behind those that are held out.
        taken: Usable rows read in all passes.
        used: Entries of the next row that are in the block before.
    """

    passes: list[int]
    rows: list[int]
    taken: list[int]
    used: int = 0

    @classmethod
    def start(cls, sources: int) -> Position:
        return cls([0] * sources, [0] * sources, [0] * sources)

    def copy(self) -> Position:
        return Position([*self.passes], [*self.rows], [*self.taken], self.used)


@dataclass
class Block:
    """Some of the stream's entries.

    Attributes:
        places: Of the row of each entry's `row`.
        start: The position of its first entry.
        after: The position behind its last one.
    """

    tokens: TokenSet
    places: list[str]
    start: Position
    after: Position


@dataclass(frozen=True)
class Shares:
    """How the sources make a stream.

    Attributes:
        parts: Their shares of the rows; they sum to 1.
        held_out: The first rows of each, which are evaluated on and never trained.
        sizes: The usable rows of each, where they were counted: with several sources.
    """

    parts: tuple[float, ...]
    held_out: tuple[int, ...]
    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, data: DataConfig, reader: ExampleReader) -> Shares:
        """The shares of a run's sources. Several are read once, to count their rows.

        Raises:
            DataError: A source cannot be read.
        """
        sources, sizes = data.train_sources, ()
        parts: list[float] = [1.0]
        if len(sources) > 1:
            sizes = tuple(reader.count(source) for source in sources)
            weights = mixed(sizes, [s.weight for s in sources], data.mix_temperature or 1.0)
            parts = [n * weight for n, weight in zip(sizes, weights, strict=True)]
        parts = [part / sum(parts) for part in parts]
        own = data.eval is not None or data.test_size == 0 or any(reader.open(s).held_out() for s in sources)
        held_out = [0] * len(sources)
        for _ in range(0 if own else data.held_out_rows):
            held_out[_next(parts, held_out)] += 1
        return cls(tuple(parts), tuple(held_out), sizes)


def _next(parts: Sequence[float], taken: Sequence[int]) -> int:
    """The source that is furthest behind its share."""
    n = sum(taken) + 1
    return max(range(len(parts)), key=lambda i: parts[i] * n - taken[i])


def head(data: DataConfig, reader: ExampleReader, shares: Shares) -> tuple[ExampleSet, ExampleSet | None]:
    """The first rows that are trained, and those that are held out; None where others are."""
    train: list[tuple[str, Example]] = []
    held: list[tuple[str, Example]] = []
    for source, part, n in zip(data.train_sources, shares.parts, shares.held_out, strict=True):
        rows = reader.read(source)
        own = list(islice(rows, n))
        first = list(islice(rows, max(1, round(part * CHECKED_ROWS))))
        if own and not first:
            raise DataError(
                Bilingual(
                    f"{source.path} has {len(own):,} rows, and data.held_out_rows = {data.held_out_rows:,} holds out "
                    "all of them: nothing is left to train on. Lower it, or name held-out rows as data.eval.",
                    f"{source.path} 有 {len(own):,} 条样本，而 data.held_out_rows = {data.held_out_rows:,} 把它们全部"
                    "留作验证，没有样本可训练。请减小它，或用 data.eval 指定验证集。",
                )
            )
        held += own
        train += first
    return ExampleSet.build(train), ExampleSet.build(held) if held else None


class TokenStream:
    """The entries of a run's training rows, block by block.

    Args:
        labels: The names of classes or tags, by number.
        step: Entries of an optimizer step.

    Attributes:
        steps: Optimizer steps of a block.
        skipped: The rows that could not be used, with place and reason, as far as they were read.
    """

    def __init__(
        self,
        data: DataConfig,
        spec: DataSpec,
        tokenizer: Tokenizer,
        shares: Shares,
        *,
        labels: list[str] | None,
        step: int,
    ) -> None:
        from siliang.data.tokens import encoding

        self.steps = -(-data.shuffle_buffer // step)
        self._data, self._spec, self._shares, self._labels = data, spec, shares, labels
        self._encode, self._kinds = encoding(tokenizer, data, spec, labels)
        self._size = self.steps * step
        self.skipped: dict[str, None] = {}
        self._at = 0  # the number of the next block
        self._blocks = self._from(Position.start(len(shares.parts)))
        self._block: Block | None = None

    @property
    def passes(self) -> int:
        """Passes over the first source that are over where the current block begins."""
        return self._block.start.passes[0] if self._block else 0

    def block(self, number: int) -> Block:
        """A block; those before it are made and dropped."""
        while self._block is None or self._at <= number:
            self._block = next(self._blocks)
            self._at += 1
        return self._block

    def where(self, row: int) -> str:
        """The place of a row of the current block."""
        assert self._block is not None
        return self._block.places[row]

    @property
    def first_state(self) -> dict[str, object]:
        """The `state_dict` of the first block."""
        return {"block": 0, **vars(Position.start(len(self._shares.parts)))}

    def state_dict(self, number: int) -> dict[str, object]:
        """Where block `number`, the current one or the next, begins."""
        assert self._block is not None
        position = self._block.start if number == self._at - 1 else self._block.after
        return {"block": number, **vars(position)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continues with the block of a `state_dict`."""
        passes, rows, taken = (_numbers(state[name]) for name in ("passes", "rows", "taken"))
        position = Position(passes, rows, taken)
        block, used = state["block"], state["used"]
        assert isinstance(block, int) and isinstance(used, int)
        position.used = used
        self._at, self._block, self._blocks = block, None, self._from(position)

    def _from(self, position: Position) -> Iterator[Block]:
        """The blocks from a position on, without end.

        Raises:
            DataError: A row cannot be used, and `skip_bad_rows` is off; or no row can.
        """
        from siliang.data.tokens import TokenSet

        entries = self._entries(position)
        start, after = position, position
        while True:
            columns: TokenColumns = {name: [] for name in self._kinds}
            places: list[str] = []
            n = 0
            while n < self._size:
                where, made, before, behind = next(entries)
                if isinstance(made, str):
                    self._skip(bad_row(where, made))
                    continue
                if before.used == 0 or not places:
                    places.append(where)
                for name in self._kinds:
                    columns[name].append(made.get(name))
                columns["row"][-1] = len(places) - 1
                n, after = n + 1, behind
            yield Block(TokenSet(SmallTable(columns, self._kinds), self._spec), places, start, after)
            start = after

    def _entries(self, start: Position) -> Iterator[tuple[str, dict[str, object] | str, Position, Position]]:
        """(place, entry or what is wrong with its row, the position of the entry, the position behind it)."""
        rows = self._rows(start)
        skip, without = start.used, 0
        while True:
            some = list(islice(rows, AT_ONCE))
            made = self._encode([example for _, example, _, _ in some])
            for (where, _, before, behind), entries in zip(some, made, strict=True):
                usable = [e for e in entries if e.get("row") != DROPPED and BAD not in e]
                without = 0 if usable else without + 1
                if without > CHECKED_ROWS:
                    raise DataError(
                        Bilingual(
                            f"{where}: the last {without:,} rows make no entry: see data.max_length and data.too_long.",
                            f"{where}：最近 {without:,} 条样本都没有可用的内容：请查看 data.max_length 和 "
                            "data.too_long。",
                        )
                    )
                for problem in (reason_of(str(e[BAD])) for e in entries if BAD in e):
                    if not self._data.skip_bad_rows:
                        raise DataError(bad_rows_message([bad_row(where, problem)]))
                    yield where, problem, before, behind
                for i, entry in enumerate(usable):
                    here, last = before.copy(), i + 1 == len(usable)
                    here.used = i
                    after = behind if last else before.copy()
                    after.used = 0 if last else i + 1
                    if skip > i:
                        continue
                    yield where, {**entry}, here, after
                skip = 0

    def _rows(self, start: Position) -> Iterator[tuple[str, Example, Position, Position]]:
        """The mixed rows from a position on: (place, example, its position, the position behind it)."""
        sources, held_out = self._data.train_sources, self._shares.held_out
        position = start.copy()
        position.used = 0
        opened: dict[int, Iterator[tuple[str, Example]]] = {}
        while True:
            i = _next(self._shares.parts, position.taken)
            before = position.copy()
            if i not in opened:
                opened[i] = self._read(sources[i], held_out[i] + position.rows[i])
            item = next(opened[i], None)
            if item is None:
                if position.rows[i] == 0:
                    path = sources[i].path
                    raise DataError(
                        Bilingual(
                            f"{path} has no row left to train on behind the {held_out[i]:,} that are held out.",
                            f"{path} 除留作评估的 {held_out[i]:,} 条外没有可训练的样本。",
                        )
                    )
                position.passes[i], position.rows[i] = position.passes[i] + 1, 0
                before = position.copy()
                opened[i] = self._read(sources[i], held_out[i])
                item = next(opened[i], None)
                assert item is not None
            position.rows[i] += 1
            position.taken[i] += 1
            yield *item, before, position.copy()

    def _read(self, source: Source, skip: int) -> Iterator[tuple[str, Example]]:
        """The usable rows of a source behind the first ones.

        Raises:
            DataError: A row cannot be used, and `skip_bad_rows` is off.
        """
        reader = ExampleReader(self._data.model_copy(update={"labels": self._labels}), self._spec)
        rows = reader.read(source)
        for number in count():
            row = next(rows, None)
            for bad in reader.skipped:
                if not self._data.skip_bad_rows:
                    raise DataError(bad_rows_message([bad]))
                self._skip(bad)
            reader.bad.clear()
            if row is None:
                return
            if number >= skip:
                yield row

    def _skip(self, bad: str) -> None:
        if len(self.skipped) < LISTED:
            self.skipped.setdefault(bad)


def _numbers(value: object) -> list[int]:
    assert isinstance(value, list)
    return [int(number) for number in value]


def check_streams(data: DataConfig, spec: DataSpec, *, whole_steps: bool, max_steps: int | None) -> None:
    """Refuses what a stream cannot give.

    Args:
        whole_steps: The loss is one of a whole step (`StepLoss`).

    Raises:
        ConfigError: The task, or a setting, needs all rows before training; or the number of steps is not set.
    """
    if max_steps is None:
        raise ConfigError(
            Bilingual(
                "data.streaming = true needs train.max_steps: the number of rows is not known before they are read.",
                "data.streaming = true 需要设置 train.max_steps：读完之前不知道有多少条样本。",
            )
        )
    why: Bilingual | None = None
    if whole_steps:
        why = Bilingual(
            f"the loss of {spec.name} is one of a whole step, and streams are for losses of single rows",
            f"{spec.name} 的损失按整步计算，而数据流只用于逐条样本计算的损失",
        )
    elif spec.windows:
        why = Bilingual(
            f"{spec.name} must know beforehand whether some questions have no answer",
            f"{spec.name} 要事先知道是否有问题没有答案",
        )
    elif spec.named is not None and data.labels is None:
        why = Bilingual(
            f"{spec.name} must know all classes or tags beforehand: name them in data.labels",
            f"{spec.name} 要事先知道所有类别或标签：请用 data.labels 给出",
        )
    elif data.stratify or data.validation_size is not None:
        name = "stratify" if data.stratify else "validation_size"
        why = Bilingual(
            f"data.{name} needs all rows: name held-out rows with data.eval",
            f"data.{name} 需要全部样本：请用 data.eval 给出验证集",
        )
    if why is not None:
        raise ConfigError(Bilingual(f"data.streaming = true: {why}.", f"不能设置 data.streaming = true：{why.zh}。"))
