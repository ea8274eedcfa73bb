"""The data of a run, before tokens: sources are read, rows become examples, some are held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from siliang.config import Columns, DataConfig, Source
from siliang.data.example_set import ExampleSet, bad_row, bad_rows_message, nothing_usable
from siliang.data.examples import Example
from siliang.data.find_layout import find_layout, second_text
from siliang.data.labels import MOST_CLASSES, known_class, no_classes
from siliang.data.layouts import RowLayout
from siliang.data.not_used import UnusedColumns
from siliang.data.numbers import is_whole
from siliang.data.reading import DataRow, Reading, columns_in_words
from siliang.data.sources import OpenedSource, open_source
from siliang.data.spec import DataSpec
from siliang.data.splitting import split, weighted
from siliang.data.task_column import with_task
from siliang.data.turns import unused_fields
from siliang.language import Bilingual, local, together
from siliang.types import DataError

SINGLE = Bilingual(
    "all rows need one, or data.layout=text-label, which does not read it",
    "所有样本都要有，或设置 data.layout=text-label，不读取它",
)


@dataclass
class Examples:
    """The data of a run, before tokens.

    Attributes:
        labels: The classes' (or tags') names by number; None where the task has none.
        skipped: The rows left out, with place and reason.
        layout: How the rows are laid out: a name of `layouts.LAYOUTS`.
        columns: The data's column of each part of the layout (text, label, ...), of those that are there.
        unused: Columns that the layout has no use for, and fields of turns, as messages[].name.
        notes: How the data was read where that was not plain from the settings, a line each.
        doubts: Rows or columns that may have been read in an unintended way, one line each.
        unused_texts: Unused columns that hold running text.
        unused_parts: Unused columns that say which part a row belongs to, with the parts that they name.
    """

    train: ExampleSet
    eval: ExampleSet
    labels: list[str] | None = None
    skipped: list[str] = field(default_factory=list)
    layout: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    unused_texts: list[str] = field(default_factory=list)
    unused_parts: dict[str, list[str]] = field(default_factory=dict)

    @property
    def says_columns(self) -> Bilingual:
        """Which columns were taken, and which were not."""
        return columns_in_words(self.layout, self.columns, self.unused)


def load_examples(data: DataConfig, spec: DataSpec, *, seed: int, keep_going: bool = False) -> Examples:
    """Reads the data, and holds out the evaluation rows: those of `data.eval`, or the held-out part that a folder of
    several parts has itself, or a share of the training rows.

    Args:
        seed: The seed of the split and of weighted sources, if the settings of the data have none.
        keep_going: Bad rows never stop the reading; `siliang check` shows all of them.

    Raises:
        DataError: The data cannot be read, its columns are not there, not one row of a part can be used, or rows are
            bad and `skip_bad_rows` is off.
    """
    seed = seed if data.seed is None else data.seed
    reader = _ExampleReader(data, spec)
    sizes: list[int] = []
    train = ExampleSet.build(_counted(data.train_sources, reader, sizes))
    stops = not data.skip_bad_rows and not keep_going
    if not len(train):
        raise DataError(reader.nothing(data.train_sources))
    if reader.bad and stops:
        raise DataError(bad_rows_message(reader.skipped))
    reader.fix_labels(train, least=1 if keep_going else 2)
    held_out = reader.held_out()
    if reader.bad and stops:
        raise DataError(bad_rows_message(reader.skipped))
    chosen = list(range(len(train)))
    if held_out is None:
        held_out = train.select([])
        if data.test_size > 0 and len(train) > 1:
            labels = reader.classes(train) if data.stratify else None
            chosen, held = split(len(train), data.test_size, seed, labels)
            held_out = train.select(held)
    if data.validation_size is not None and len(chosen) > 1:
        labels = reader.classes(train.select(chosen)) if data.stratify else None
        kept, validation = split(len(chosen), data.validation_size, seed, labels)
        held_out = train.select([chosen[i] for i in validation])
        chosen = [chosen[i] for i in kept]
    weights = [s.weight for s in data.train_sources]
    if any(w != 1.0 for w in weights):
        chosen = weighted(chosen, sizes, weights, seed)
    if len(chosen) != len(train) or chosen != list(range(len(train))):
        train = train.select(chosen)
    return reader.examples(train, held_out)


@dataclass(frozen=True)
class RunLayout:
    """How the rows of a run were laid out.

    Attributes:
        layout: A name of `layouts.LAYOUTS`.
        columns: The column of each part.
    """

    layout: str
    columns: dict[str, str]


def load_rows(data: DataConfig, spec: DataSpec, source: str, like: RunLayout | None = None) -> Examples:
    """Rows to be evaluated on, as `eval` of the result: what a folder of several parts holds out, or all of them.

    Args:
        data: With the classes of the run that is evaluated.
        like: How its rows were laid out.

    Raises:
        DataError: As `load_examples` does.
    """
    reader = _ExampleReader(data, spec, like)
    rows = reader.evaluated([Source(path=source)])
    if reader.bad and not data.skip_bad_rows:
        raise DataError(bad_rows_message(reader.skipped))
    return reader.examples(rows[:0], rows)


class _ExampleReader:
    """Rows to examples, for one run: the layout is found on the first good row, the labels after the training rows."""

    def __init__(self, data: DataConfig, spec: DataSpec, like: RunLayout | None = None) -> None:
        self.data, self.spec, self.like = data, spec, like
        self.reading = Reading(data.header, data.encoding, data.separator, tagged="tokens-tags" in spec.layouts)
        self.bad: list[tuple[str, str]] = []  # place, reason
        self.labels: list[str] | None = data.labels
        self.layout: RowLayout | None = None
        self.columns = data.columns
        self._seen: dict[str, None] = {}  # the columns of all rows
        self._fields: set[str] = set()  # of turns, that nothing is made of
        self._unused = UnusedColumns()
        self._opened: dict[str, OpenedSource] = {}
        self._read: set[tuple[str, str]] = set()  # (source, part)

    @property
    def skipped(self) -> list[str]:
        return [bad_row(where, reason) for where, reason in self.bad]

    def open(self, source: Source) -> OpenedSource:
        """The source's files, found once."""
        if source.path not in self._opened:
            self._opened[source.path] = open_source(source.path, self.reading)
        return self._opened[source.path]

    def read(self, source: Source, part: str = "train") -> Iterator[tuple[str, Example]]:
        """(place, example) of the usable rows of a part; the others go to `bad`.

        Raises:
            DataError: The part holds no rows, or none that can be read.
        """
        opened, some, before = self.open(source), False, len(self.bad)
        named = opened.part(part)
        self._read.add((source.path, named))
        rows = opened.rows(named, self.reading)
        make = None
        for row in rows:
            some = True
            if row.problem is not None:
                self.bad.append((row.where, row.problem))
                continue
            make = make or self._maker(row, source)
            self._seen.update(dict.fromkeys(row.values))
            self._fields |= unused_fields(row.values, self.columns) if "messages" in self.spec.layouts else set()
            self._unused.look(row.values, self._taken())
            made = make(row)
            if isinstance(made, str):
                self.bad.append((row.where, made))
            else:
                yield row.where, made
        if not some:
            raise DataError(Bilingual(f"{source.path} holds no rows.", f"{source.path} 中没有样本。"))
        if make is None:
            raise DataError(nothing_usable(source.path, self.bad[before:]))

    def held_out(self) -> ExampleSet | None:
        """The rows of data.eval, or of the held-out part of the training data's own folder; None where there is
        neither."""
        data = self.data
        if data.eval_sources:
            in_train = {s.path for s in data.train_sources}  # a data set of several parts: the other part
            for source in data.eval_sources:
                if source.path in in_train:
                    self.open(source).part("test")
            return self.evaluated(data.eval_sources)
        own = [s for s in data.train_sources if self.open(s).held_out()]
        if not own or data.test_size == 0:
            return None
        return self.evaluated(own)

    def evaluated(self, sources: list[Source]) -> ExampleSet:
        """The rows of sources that are evaluated on: of each the part that is held out, or, where it has none, all.

        Raises:
            DataError: Not one row of them can be used.
        """
        found: list[tuple[Source, list[str]]] = [(s, self.open(s).held_out()) for s in sources]
        rows = ExampleSet.build(chain.from_iterable(self._evaluated(s, parts) for s, parts in found))
        if not len(rows):
            raise DataError(self.nothing(sources))
        return rows

    def _evaluated(self, source: Source, parts: list[str]) -> Iterator[tuple[str, Example]]:
        opened = self.open(source)
        if not parts:
            only = next(iter(opened.parts)) if len(opened.parts) == 1 else "train"
            yield from self.read(source, only)
            return
        for i, part in enumerate(parts):
            before, some = len(self.bad), False
            for item in self.read(source, part):
                some = True
                yield item
            if some or i + 1 == len(parts):
                path = source.path
                self.reading.note(Bilingual(f"{path}: its part {part!r} is held out", f"{path}：{part!r} 部分留作评估"))
                return
            reason = self.bad[before][1]
            del self.bad[before:]  # public test sets hide their classes
            self.reading.note(
                Bilingual(
                    f"{source.path}: not one row of its part {part!r} can be used (each {reason})",
                    f"{source.path}：{part!r} 部分没有一条样本可用（每条都{local(reason, 'zh')}）",
                )
            )

    def nothing(self, sources: list[Source]) -> str:
        """Says that not one row of these sources can be used."""
        return nothing_usable(", ".join(s.path for s in sources), self.bad)

    def examples(self, train: ExampleSet, held_out: ExampleSet) -> Examples:
        """The result."""
        layout = self.layout
        taken = {part: name for part, name in self._taken().items() if name in self._seen}
        unused = [*(name for name in self._seen if name not in taken.values()), *sorted(self._fields)]
        name = layout.name if layout else ""
        for path, opened in self._opened.items():
            if left := [part for part in opened.parts if (path, part) not in self._read]:
                names = ", ".join(map(repr, left))
                self.reading.note(
                    Bilingual(f"{path}: not used: its part {names}", f"{path}：未使用其中的 {names} 部分")
                )
        notes, doubts, cells = self.reading.notes, self.reading.doubts, self._unused
        return Examples(
            train,
            held_out,
            self.labels,
            self.skipped,
            name,
            taken,
            unused,
            notes,
            doubts,
            [column for column in unused if cells.is_running_text(column)],
            {column: sorted(cells.parts[column]) for column in unused if column in cells.parts},
        )

    def _taken(self) -> dict[str, str]:
        return {} if self.layout is None else self.layout.taken(self.columns)

    def _maker(self, row: DataRow, source: Source) -> Callable[[DataRow], Example | str]:
        layout, columns = self._layout(row, source)
        if self.layout is None:
            self.layout, self.columns = layout, columns
        elif layout is not self.layout and self.spec.one_layout:
            before = self.layout.name
            raise DataError(
                Bilingual(
                    f"{source.path} has the layout {layout.name}, and the data before it {before}.",
                    f"{source.path} 的格式是 {layout.name}，它之前的数据是 {before}。",
                )
            )
        fixed = self._labels_are_numbers()
        # chosen by the first row, which has no second text
        single = layout.name == "text-label" and self.data.layout == "auto" and self.like is None

        def make(row: DataRow) -> Example | str:
            pair = second_text(row.values, self.data.columns) if single else None
            if pair is not None and row.values[pair] not in (None, ""):
                return Bilingual(
                    f"has a second text in {pair!r}, and the first row has none: {SINGLE}",
                    f"的 {pair!r} 中有第二段文本，而第一条样本没有：{local(SINGLE, 'zh')}",
                )
            made = layout.example(row.values, columns)
            if self.spec.adapt is not None and not isinstance(made, str):
                made = self.spec.adapt(made)
            made = with_task(made, row.values, columns.task_id)
            if self.data.skip_bad_rows and not isinstance(made, str):  # otherwise SL018 names them all
                made = made.problem or made
            if isinstance(made, str) or self.labels is None or self.spec.named is None:
                return made
            return known_class(made, self.labels, fixed, "label" if self.spec.named == "label" else "tag")

        return make

    def _layout(self, row: DataRow, source: Source) -> tuple[RowLayout, Columns]:
        """The layout of a source's rows, and its columns: those of the run that is evaluated, where they are there."""
        columns, like = self.data.columns, self.like
        if like is None:
            return find_layout(self.data.layout, row.values, self.spec, columns, source.path)
        own = columns.model_copy(update={k: v for k, v in like.columns.items() if k in Columns.model_fields})
        try:
            return find_layout(like.layout, row.values, self.spec, own, source.path)
        except DataError:
            pass
        try:
            return find_layout(like.layout, row.values, self.spec, columns, source.path)
        except DataError:
            missing = next((name for name in like.columns.values() if name not in row.values), "")
            there = ", ".join(map(repr, row.values))
            raise DataError(
                Bilingual(
                    f"{source.path} has no column {missing!r}, which the run was trained on; it has {there}.",
                    f"{source.path} 没有训练时所用的列 {missing!r}；它有 {there}。",
                )
            ) from None

    def _labels_are_numbers(self) -> bool:
        """The data may say 0 and 1 where data.labels names the classes."""
        return bool(self.data.labels) and not any(map(is_whole, self.data.labels or ()))

    def fix_labels(self, train: ExampleSet, least: int = 2) -> None:
        """The classes of the training rows, if they are not given."""
        part = self.spec.named
        if part is None:
            self.labels = None
            return
        if self.labels is not None or not len(train):
            return
        found: set[str] = set()
        for example in train:
            found.update(example.classes)
        path, name, n = self.data.train_sources[0].path, getattr(self.columns, part), len(found)
        column = Bilingual(f"{path}: column {name!r} ", f"{path}：列 {name!r} ")
        if problem := no_classes(found, len(train)) if part == "label" else None:
            raise DataError(together(column, problem))
        if n > MOST_CLASSES:
            raise DataError(
                together(
                    column,
                    Bilingual(
                        f"has {n:,} different values: these are not classes.", f"有 {n:,} 个不同的值：这不是类别。"
                    ),
                )
            )
        if n < least:
            only = sorted(found)
            raise DataError(
                together(
                    column,
                    Bilingual(f"has one class only, {only}: nothing to learn.", f"只有一个类别 {only}：无可学习。"),
                )
            )
        self.labels = sort_labels(found)

    def classes(self, train: ExampleSet) -> list[int] | None:
        """The class of each row, for a stratified split."""
        if self.spec.named != "label" or self.labels is None:
            return None
        numbers = {name: i for i, name in enumerate(self.labels)}
        return [numbers[example.classes[0]] for example in train]


def sort_labels(found: set[str]) -> list[str]:
    """Names in a stable order: O first, then whole numbers by value (2 before 10), then words."""

    def key(name: str) -> tuple[int, int, str]:
        return (-1, 0, "") if name == "O" else (0, int(name), name) if is_whole(name) else (1, 0, name)

    return sorted(found, key=key)


def _counted(sources: list[Source], reader: _ExampleReader, sizes: list[int]) -> Iterator[tuple[str, Example]]:
    for source in sources:
        n = 0
        for item in reader.read(source):
            n += 1
            yield item
        sizes.append(n)
