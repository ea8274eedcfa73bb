"""The data of a run, before tokens: sources are read, rows become examples, some are held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from siliang.config import DataConfig, Source
from siliang.data.example import Example
from siliang.data.example_reader import ExampleReader, RunLayouts
from siliang.data.example_set import ExampleSet, bad_rows_message
from siliang.data.reading import columns_in_words
from siliang.data.spec import DataSpec
from siliang.data.splitting import mixed, split, weighted
from siliang.data.stream import Shares, head
from siliang.language import Bilingual
from siliang.types import ConfigError, DataError


@dataclass
class Examples:
    """The data of a run, before tokens.

    Attributes:
        labels: The classes' (or tags') names by number; None where the task has none.
        skipped: The rows left out, with place and reason.
        layouts: How the rows are laid out: names of `layouts.LAYOUTS`, in the order of the sources, each with the
            data's column of each part of it (text, label, ...), of those that are there.
        unused: Columns that the layout has no use for, and fields of turns, as messages[].name.
        notes: How the data was read where that was not plain from the settings, a line each.
        doubts: Rows or columns that may have been read in an unintended way, one line each.
        unused_texts: Unused columns that hold running text.
        unused_parts: Unused columns that say which part a row belongs to, with the parts that they name.
        shares: How the sources make a stream, of which `train` is the beginning; None for data that is read whole.
    """

    train: ExampleSet
    eval: ExampleSet
    labels: list[str] | None = None
    skipped: list[str] = field(default_factory=list)
    layouts: dict[str, dict[str, str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    unused_texts: list[str] = field(default_factory=list)
    unused_parts: dict[str, list[str]] = field(default_factory=dict)
    shares: Shares | None = None

    @property
    def layout(self) -> str:
        """The layout of the first source; empty without rows."""
        return next(iter(self.layouts), "")

    @property
    def columns(self) -> dict[str, str]:
        """The columns of the first layout."""
        return next(iter(self.layouts.values()), {})

    @property
    def says_columns(self) -> Bilingual:
        """Which columns were taken, and which were not."""
        return columns_in_words(self.layouts, self.unused)


def load_examples(data: DataConfig, spec: DataSpec, *, seed: int, keep_going: bool = False) -> Examples:
    """Reads the data, and holds out the evaluation rows: those of `data.eval`, or the held-out part that a folder of
    several parts has itself, or a share of the training rows.

    Args:
        seed: The seed of the split and of weighted sources, if the settings of the data have none.
        keep_going: Bad rows never stop the reading; `siliang check` shows all of them.

    Raises:
        DataError: The data cannot be read, its columns are not there, not one row of a part can be used, or rows are
            bad and `skip_bad_rows` is off.
        ConfigError: One source is to be mixed.
    """
    if data.mix_temperature is not None and len(data.train_sources) < 2:
        raise ConfigError(
            Bilingual(
                f"data.mix_temperature = {data.mix_temperature:g} needs several sources in data.train: there is one.",
                f"data.mix_temperature = {data.mix_temperature:g} 需要 data.train 中有多个来源，现在只有一个。",
            )
        )
    if data.streaming:
        _check_weight(data)
        return _head(data, spec, keep_going=keep_going)
    seed = seed if data.seed is None else data.seed
    reader = ExampleReader(data, spec, is_checked=True)
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
    if data.mix_temperature is not None:
        ends = np.cumsum(sizes)
        counts = np.bincount(np.searchsorted(ends, chosen, side="right"), minlength=len(sizes)).tolist()
        weights = mixed(counts, weights, data.mix_temperature)
        for source, n, weight in zip(data.train_sources, counts, weights, strict=True):
            reader.reading.note(says_mixed(source.path, n, weight))
    if any(w != 1.0 for w in weights):
        chosen = weighted(chosen, sizes, weights, seed)
    if len(chosen) != len(train) or chosen != list(range(len(train))):
        train = train.select(chosen)
    return _examples(reader, train, held_out)


def _check_weight(data: DataConfig) -> None:
    """Raises ConfigError where the only source of a stream has a weight: it is a share among several."""
    if len(data.train_sources) == 1 and (weight := data.train_sources[0].weight) != 1:
        raise ConfigError(
            Bilingual(
                f"data.streaming takes the weight of a source as its share among several: of a single one, the weight "
                f"{weight:g} has no effect. Leave it out.",
                f"data.streaming 把来源的权重当作它在多个来源中的份额：只有一个来源时，权重 {weight:g} 不起作用。"
                "请去掉它。",
            )
        )


def _head(data: DataConfig, spec: DataSpec, *, keep_going: bool) -> Examples:
    """The first rows of a stream, as far as they are checked, and those held out.

    Raises:
        DataError: As `load_examples` does.
    """
    reader = ExampleReader(data, spec, is_checked=True)
    shares = Shares.of(data, reader)
    train, held_out = head(data, reader, shares)
    if not len(train):
        raise DataError(reader.nothing(data.train_sources))
    if held_out is None:
        held_out = reader.held_out()
    if reader.bad and not (data.skip_bad_rows or keep_going):
        raise DataError(bad_rows_message(reader.skipped))
    reader.fix_labels(train, least=1)
    held_out = train.select([]) if held_out is None else held_out
    n, buffer = len(train), data.shuffle_buffer
    reader.reading.note(
        Bilingual(
            f"streamed: the first {n:,} rows are checked, {buffer:,} entries at a time are shuffled",
            f"数据流：检查前 {n:,} 条样本，每次打乱 {buffer:,} 条",
        )
    )
    for source, size, part in zip(data.train_sources, shares.sizes, shares.parts, strict=False):
        reader.reading.note(
            Bilingual(
                f"{source.path}: {size:,} rows, {100 * part:.3g}% of the stream",
                f"{source.path}：{size:,} 条样本，占数据流的 {100 * part:.3g}%",
            )
        )
    found = _examples(reader, train, held_out)
    found.shares = shares
    return found


def load_rows(data: DataConfig, spec: DataSpec, source: str, like: RunLayouts | None = None) -> Examples:
    """Rows to be evaluated on, as `eval` of the result: what a folder of several parts holds out, or all of them.

    Args:
        data: With the classes of the run that is evaluated.
        like: How the rows of that run were laid out.

    Raises:
        DataError: As `load_examples` does.
    """
    reader = ExampleReader(data, spec, like)
    rows = reader.evaluated([Source(path=source)])
    if reader.bad and not data.skip_bad_rows:
        raise DataError(bad_rows_message(reader.skipped, trained=True))
    return _examples(reader, rows[:0], rows)


def says_mixed(path: str, n: int, weight: float) -> Bilingual:
    """How often the rows of a source are used in a mixture."""
    return Bilingual(
        f"{path}: {n:,} rows, each used {weight:.3g} times in an epoch (data.mix_temperature)",
        f"{path}：{n:,} 条样本，每轮各用 {weight:.3g} 次（data.mix_temperature）",
    )


def _examples(reader: ExampleReader, train: ExampleSet, held_out: ExampleSet) -> Examples:
    reader.note_unread_parts()
    cells, unused = reader.cells, reader.unused
    return Examples(
        train,
        held_out,
        reader.labels,
        reader.skipped,
        reader.layouts,
        unused,
        reader.reading.notes,
        reader.reading.doubts,
        [column for column in unused if cells.is_running_text(column)],
        {column: sorted(cells.parts[column]) for column in unused if column in cells.parts},
    )


def _counted(sources: list[Source], reader: ExampleReader, sizes: list[int]) -> Iterator[tuple[str, Example]]:
    for source in sources:
        n = 0
        for item in reader.read(source):
            n += 1
            yield item
        sizes.append(n)
