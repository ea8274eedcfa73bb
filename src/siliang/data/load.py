"""The data of a run, before tokens: sources are read, rows become examples, some are held out."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from siliang.config import DataConfig, Source
from siliang.data.examples import Example, ExampleSet, Labelled, Tagged
from siliang.data.formats import Format, as_source_target, find_format
from siliang.data.sources import Row, iter_rows
from siliang.types import DataError, TaskType

SHOWN_BAD_ROWS = 5


@dataclass
class Examples:
    """The data of a run, before tokens.

    Attributes:
        labels: The classes' (or tags') names by number; None where the task has none.
        skipped: The rows left out, with place and reason.
        layout: How the rows are laid out: a name of `formats.FORMATS`.
    """

    train: ExampleSet
    eval: ExampleSet
    labels: list[str] | None = None
    skipped: list[str] = field(default_factory=list)
    layout: str = ""


def load_examples(data: DataConfig, task: TaskType, *, seed: int, keep_going: bool = False) -> Examples:
    """Reads the data, and holds out the evaluation rows.

    Args:
        seed: Of the split and of weighted sources, where the data has no seed of its own.
        keep_going: Bad rows do not stop, whatever the settings say; `siliang check` shows them all.

    Raises:
        DataError: The data cannot be read, its columns are not there, or rows are bad and `skip_bad_rows` is off.
    """
    seed = seed if data.seed is None else data.seed
    reader = _Reader(data, task)
    sizes: list[int] = []
    train = ExampleSet.build(_counted(data.train_sources, reader, sizes))
    stops = not data.skip_bad_rows and not keep_going
    if reader.bad and stops:
        raise DataError(bad_rows_message(reader.bad))
    reader.fix_labels(train, least=1 if keep_going else 2)
    in_train = {s.path for s in data.train_sources}  # a data set of several parts: the other part
    parts = [(s, "test" if s.path in in_train else "train") for s in data.eval_sources]
    held_out = ExampleSet.build(chain.from_iterable(reader.read(s, part) for s, part in parts))
    if reader.bad and stops:
        raise DataError(bad_rows_message(reader.bad))
    if not len(train):
        raise DataError(f"{data.train_sources[0].path}: not one row can be used. {bad_rows_message(reader.bad)}")
    chosen = list(range(len(train)))
    if not data.eval_sources and data.test_size > 0 and len(train) > 1:
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
        chosen = _weighted(chosen, sizes, weights, seed)
    if len(chosen) != len(train) or chosen != list(range(len(train))):
        train = train.select(chosen)
    return Examples(train, held_out, reader.labels, reader.bad, reader.layout.name if reader.layout else "")


def split(n: int, test_size: float, seed: int, labels: list[int] | None = None) -> tuple[list[int], list[int]]:
    """(training rows, held-out rows), the same as Dataset.train_test_split gives for this size and seed.

    Args:
        labels: The class of each row, of which each part gets the same share.

    Raises:
        DataError: A class is too small to be split.
    """
    from datasets import ClassLabel, Dataset, disable_progress_bars

    disable_progress_bars()
    rows = Dataset.from_dict({"row": list(range(n))})
    by: str | None = None
    if labels is not None:
        by = "label"
        rows = rows.add_column("label", labels).cast_column("label", ClassLabel(num_classes=max(labels) + 1))  # type: ignore[call-arg]
    try:
        parts = rows.train_test_split(test_size, seed=seed, stratify_by_column=by)
    except ValueError as error:
        raise DataError(f"data.test_size = {test_size} with data.stratify: {error}.") from None
    return parts["train"]["row"][:], parts["test"]["row"][:]


def bad_rows_message(bad: list[str]) -> str:
    """The first few bad rows, and how to go on without them."""
    more = f"; and {len(bad) - SHOWN_BAD_ROWS:,} more" if len(bad) > SHOWN_BAD_ROWS else ""
    rows = "1 row is bad" if len(bad) == 1 else f"{len(bad)} rows are bad"
    return (
        f"{rows}: {'; '.join(bad[:SHOWN_BAD_ROWS])}{more}.\nMend them, or leave them out with data.skip_bad_rows=true."
    )


class _Reader:
    """Rows to examples, for one run: the layout is found on the first good row, the labels after the training rows."""

    def __init__(self, data: DataConfig, task: TaskType) -> None:
        self.data, self.task = data, task
        self.bad: list[str] = []
        self.labels: list[str] | None = data.labels
        self.layout: Format | None = None

    def read(self, source: Source, part: str = "train") -> Iterator[tuple[str, Example]]:
        """(place, example) of the usable rows; the others go to `bad`."""
        data = self.data
        tagged = self.task is TaskType.TOKEN_CLS
        waiting: list[Row] = []  # bad rows in front of the first good one
        make = None
        some = False
        for row in iter_rows(source.path, header=data.header, split=part, tagged=tagged):
            some = True
            if row.problem is not None:
                self.bad.append(f"{row.where} {row.problem}")
                waiting.append(row)
                continue
            make = make or self._maker(row, source)
            made = make(row)
            if isinstance(made, str):
                self.bad.append(f"{row.where} {made}")
            else:
                yield row.where, made
        if not some:
            raise DataError(f"{source.path} holds no rows.")
        if make is None:
            raise DataError(bad_rows_message([f"{row.where} {row.problem}" for row in waiting]))

    def _maker(self, row: Row, source: Source) -> Callable[[Row], Example | str]:
        layout, columns = find_format(self.data.format, row.values, self.task, self.data.columns, source.path)
        self.layout = self.layout or layout
        fixed = self._labels_are_numbers()

        def make(row: Row) -> Example | str:
            made = layout.read(row.values, columns)
            if self.task is TaskType.SEQ_2_SEQ_LM:
                made = as_source_target(made)
            return made if isinstance(made, str) or self.labels is None else _known(made, self.labels, fixed)

        return make

    def _labels_are_numbers(self) -> bool:
        """The data may say 0 and 1 where data.labels names the classes."""
        return bool(self.data.labels) and not any(name.lstrip("-").isdigit() for name in self.data.labels or ())

    def fix_labels(self, train: ExampleSet, least: int = 2) -> None:
        """The classes that the training rows have, where nobody said them."""
        if self.task not in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
            self.labels = None
            return
        if self.labels is not None or not len(train):
            return
        found: set[str] = set()
        for example in train:
            found.update(example.tags if isinstance(example, Tagged) else [example.label])  # type: ignore[union-attr]
        if len(found) > 1000:
            raise DataError(
                f"column {self.data.columns.label!r} has {len(found)} different values: these are no classes."
            )
        if len(found) < least:
            raise DataError(
                f"{self.data.train_sources[0].path}: column {self.data.columns.label!r} has one class only, "
                f"{sorted(found)}: nothing to learn."
            )
        self.labels = sort_labels(found)

    def classes(self, train: ExampleSet) -> list[int] | None:
        """The class of each row, for a stratified split."""
        if self.task is not TaskType.SEQ_CLS or self.labels is None:
            return None
        numbers = {name: i for i, name in enumerate(self.labels)}
        return [numbers[e.label] for e in train if isinstance(e, Labelled)]


def sort_labels(found: set[str]) -> list[str]:
    """Names in a stable order: O first, then numbers by value (2 before 10), then words."""

    def key(name: str) -> tuple[int, int, str]:
        return (-1, 0, "") if name == "O" else (0, int(name), "") if name.lstrip("-").isdigit() else (1, 0, name)

    return sorted(found, key=key)


def _known(made: Example, labels: list[str], by_number: bool) -> Example | str:
    """The example, with numbers turned into names where that is how the data says its classes; or what is wrong."""
    if isinstance(made, Labelled):
        names, what = [made.label], "label"
    elif isinstance(made, Tagged):
        names, what = list(made.tags), "tag"
    else:
        return made
    if by_number and all(n.isdigit() and int(n) < len(labels) for n in names):
        names = [labels[int(n)] for n in names]
        if isinstance(made, Labelled):
            return Labelled(made.text, names[0], made.pair)
        return Tagged(made.tokens, tuple(names))
    for name in names:
        if name not in labels:
            return f"has the {what} {name!r}, which is not one of {', '.join(labels)}"
    return made


def _counted(sources: list[Source], reader: _Reader, sizes: list[int]) -> Iterator[tuple[str, Example]]:
    for source in sources:
        n = 0
        for item in reader.read(source):
            n += 1
            yield item
        sizes.append(n)


def _weighted(chosen: list[int], sizes: list[int], weights: list[float], seed: int) -> list[int]:
    """Each row as often as its source weighs; the part of a weight behind the point by chance."""
    chance = random.Random(seed)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    rows: list[int] = []
    for i in chosen:
        weight = weights[next(k for k, end in enumerate(ends) if i < end)]
        times = math.floor(weight) + (chance.random() < weight - math.floor(weight))
        rows += [i] * times
    return rows
