"""Reads a run's sources: rows to examples. Each source has the layout that its own columns show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain

from siliang.config import Columns, DataConfig, Source
from siliang.data.cells import BadRow
from siliang.data.example import Example
from siliang.data.example_set import ExampleSet, bad_row, nothing_usable
from siliang.data.find_layout import find_layout, second_text
from siliang.data.labels import find_labels, known_class
from siliang.data.layouts import RowLayout
from siliang.data.not_used import UnusedColumns
from siliang.data.numbers import is_whole
from siliang.data.reading import DataRow, Reading
from siliang.data.sources import OpenedSource, open_source
from siliang.data.spec import DataSpec
from siliang.data.task_column import with_task
from siliang.data.turns import unused_fields
from siliang.language import Bilingual, local, together
from siliang.types import DataError

SINGLE = Bilingual(
    "all rows need one, or data.layout=text-label, which does not read it",
    "所有样本都要有，或设置 data.layout=text-label，不读取它",
)


RunLayouts = Mapping[str, Mapping[str, str]]  # the layouts of a run, each with the column of each part


class ExampleReader:
    """Rows to examples, for one run: a source's layout is found on its first good row, the labels after the training
    rows.

    Attributes:
        bad: The rows that cannot be used: place and reason.
        columns: Of the first layout.
    """

    def __init__(
        self, data: DataConfig, spec: DataSpec, like: RunLayouts | None = None, *, is_checked: bool = False
    ) -> None:
        """Prepares a reader.

        Args:
            is_checked: `check` names the rows that have a problem although they can be read; otherwise they are bad.
        """
        self.data, self.spec, self.like = data, spec, like
        self._takes_problems = is_checked and not data.skip_bad_rows
        self.reading = Reading(data.header, data.encoding, data.separator, tagged="tokens-tags" in spec.layouts)
        self.bad: list[tuple[str, str]] = []
        self.labels: list[str] | None = data.labels
        self.columns = data.columns
        self.cells = UnusedColumns()
        self._layouts: dict[str, dict[str, str]] = {}  # with the column of each part, those included that are not there
        self._seen: dict[str, None] = {}  # the columns of all rows
        self._left: dict[str, None] = {}  # those that the layout of their source has no use for
        self._fields: set[str] = set()  # of turns, that nothing is made of
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
        make, taken = None, dict[str, str]()
        for row in rows:
            some = True
            if row.problem is not None:
                self.bad.append((row.where, row.problem))
                continue
            if make is None:
                make, taken = self._maker(row, source)
            self._seen.update(dict.fromkeys(row.values))
            self._left.update(dict.fromkeys(name for name in row.values if name not in taken.values()))
            self._fields |= unused_fields(row.values, self.columns) if "messages" in self.spec.layouts else set()
            self.cells.look(row.values, taken)
            made = make(row)
            if isinstance(made, str):
                self.bad.append((row.where, made))
            else:
                yield row.where, made
        if not some:
            raise DataError(Bilingual(f"{source.path} holds no rows.", f"{source.path} 中没有样本。"))
        if make is None:
            raise DataError(nothing_usable(source.path, self.bad[before:]))

    def count(self, source: Source) -> int:
        """The rows of a source that can be read."""
        opened = self.open(source)
        return sum(row.problem is None for row in opened.rows(opened.part("train"), self.reading))

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

    @property
    def layouts(self) -> dict[str, dict[str, str]]:
        """The layouts of the rows, in the order of the sources, with the columns of each that are there."""
        return {
            name: {part: column for part, column in taken.items() if column in self._seen}
            for name, taken in self._layouts.items()
        }

    @property
    def unused(self) -> list[str]:
        """Columns that their layout has no use for, and fields of turns."""
        return [*self._left, *sorted(self._fields)]

    def note_unread_parts(self) -> None:
        """Notes the parts of folders that were not read."""
        for path, opened in self._opened.items():
            if left := [part for part in opened.parts if (path, part) not in self._read]:
                names = ", ".join(map(repr, left))
                self.reading.note(
                    Bilingual(f"{path}: not used: its part {names}", f"{path}：未使用其中的 {names} 部分")
                )

    def _maker(self, row: DataRow, source: Source) -> tuple[Callable[[DataRow], Example | str], dict[str, str]]:
        """What makes an example of a row of this source; and the column of each part of its layout."""
        layout, columns = self._layout(row, source)
        if not self._layouts:
            self.columns = columns
        elif layout.name not in self._layouts and self.spec.one_layout:
            before = next(iter(self._layouts))
            raise DataError(
                Bilingual(
                    f"{source.path} has the layout {layout.name}, and the data before it {before}.",
                    f"{source.path} 的格式是 {layout.name}，它之前的数据是 {before}。",
                )
            )
        taken = layout.taken(columns)
        self._layouts.setdefault(layout.name, taken)
        fixed = self._labels_are_numbers()
        # chosen by the first row, which has no second text
        single = layout.name == "text-label" and (source.layout or self.data.layout) == "auto" and self.like is None

        def make(row: DataRow) -> Example | str:
            pair = second_text(row.values, self.data.columns) if single else None
            if pair is not None and row.values[pair] not in (None, ""):
                return Bilingual(
                    f"has a second text in {pair!r}, and the first row has none: {SINGLE}",
                    f"的 {pair!r} 中有第二段文本，而第一条样本没有：{local(SINGLE, 'zh')}",
                )
            made = layout.example(row.values, columns, self.spec.read_label)
            if self.spec.adapt is not None and not isinstance(made, str):
                made = self.spec.adapt(made)
            made = with_task(made, row.values, columns.task_id)
            if not self._takes_problems and not isinstance(made, str):
                made = made.problem or made
            if isinstance(made, str) or self.labels is None or self.spec.named is None:
                return made
            return known_class(made, self.labels, fixed, "label" if self.spec.named == "label" else "tag")

        return make, taken

    def _layout(self, row: DataRow, source: Source) -> tuple[RowLayout, Columns]:
        """The layout of a source's rows, and its columns: those of the run that is evaluated, where they are there."""
        columns, like, path = self.data.columns, self.like, source.path
        if like is None:
            return find_layout(source.layout or self.data.layout, row.values, self.spec, columns, path)
        for name in sorted(like, key=self.spec.layouts.index):
            own = {k: v for k, v in like[name].items() if k in Columns.model_fields}
            for named in (columns.model_copy(update=own), columns):
                try:
                    return find_layout(name, row.values, self.spec, named, path)
                except DataError:
                    continue
        missing = next((name for taken in like.values() for name in taken.values() if name not in row.values), "")
        there = ", ".join(map(repr, row.values))
        raise DataError(
            Bilingual(
                f"{path} has no column {missing!r}, which the run was trained on; it has {there}.",
                f"{path} 没有训练时所用的列 {missing!r}；它有 {there}。",
            )
        )

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
        path, name = self.data.train_sources[0].path, getattr(self.columns, part)
        try:
            self.labels = find_labels(found, len(train), self.spec, least)
        except BadRow as problem:
            column = Bilingual(f"{path}: column {name!r} ", f"{path}：列 {name!r} ")
            raise DataError(together(column, problem.text)) from None

    def classes(self, train: ExampleSet) -> list[int] | None:
        """The class of each row, for a stratified split."""
        if self.spec.named != "label" or self.spec.several or self.labels is None:
            return None
        numbers = {name: i for i, name in enumerate(self.labels)}
        return [numbers[example.classes[0]] for example in train]
