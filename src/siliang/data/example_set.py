"""Examples in a table: a small one of a few, an Arrow table of many, mapped from files where memory is too small."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

from siliang.data.cache import cache_folder, prune
from siliang.data.example import Example
from siliang.data.examples import from_json, to_json
from siliang.data.small_table import SmallTable
from siliang.language import Bilingual, local, together

if TYPE_CHECKING:  # half a second of importing that a plan without data does not need
    from datasets import Dataset

SPILLED = "rows-"
SPILL_BYTES = 64 * 2**20  # examples beyond this are in a file
FEW_ROWS = 2_000  # fewer are in a small table, which needs no import of `datasets`
KINDS = {"example": "str", "where": "str"}
SHOWN_BAD_ROWS = 5


def bad_rows_message(bad: list[str], *, trained: bool = False) -> Bilingual:
    """The first few bad rows, and how to continue without them.

    Args:
        trained: The rows are for a trained run, whose settings are in its folder.
    """
    remedy = Bilingual(
        "Correct them, or leave them out with data.skip_bad_rows=true.", "请改正，或用 data.skip_bad_rows=true 跳过。"
    )
    if trained:
        remedy = Bilingual(
            "Correct them, or leave them out with data.skip_bad_rows: true in the run.yaml of the run.",
            "请改正，或在该运行的 run.yaml 中用 data.skip_bad_rows: true 跳过。",
        )
    return together(named_bad_rows(bad), "\n", remedy)


def named_bad_rows(bad: list[str]) -> Bilingual:
    """The first few bad rows, as a sentence."""
    n, shown = len(bad), first_rows(bad, SHOWN_BAD_ROWS)
    rows, rows_zh = "1 row is bad" if n == 1 else f"{n:,} rows are bad", f"{n:,} 条样本有问题"
    return Bilingual(f"{rows}: {shown}.", f"{rows_zh}：{shown.zh}。")


def first_rows(bad: list[str], most: int) -> Bilingual:
    """The first bad rows, each with its reason, and how many more there are."""
    left = len(bad) - most
    more, more_zh = (f"; and {left:,} more", f"；另有 {left:,} 条") if left > 0 else ("", "")
    return Bilingual("; ".join(bad[:most]) + more, "；".join(local(row, "zh") for row in bad[:most]) + more_zh)


def nothing_usable(source: str, bad: list[tuple[str, str]]) -> Bilingual:
    """Says that not one row can be used: in one line where all are bad in one way."""
    if len({reason for _, reason in bad}) == 1:
        n, row = len(bad), bad_row(*bad[0])
        every, every_zh = (f", and so does each of the {n:,}", f"，{n:,} 条都如此") if n > 1 else ("", "")
        return Bilingual(
            f"{source}: not one row can be used: {row}{every}.", f"{source}：没有一条样本可用：{row.zh}{every_zh}。"
        )
    rows = named_bad_rows([bad_row(where, reason) for where, reason in bad])
    return Bilingual(f"{source}: not one row can be used. {rows}", f"{source}：没有一条样本可用。{rows.zh}")


def bad_row(where: str, reason: str) -> Bilingual:
    """A bad row's place and what is wrong with it."""
    return together(where, " ", reason)


class ExampleSet(Sequence[Example]):
    """Examples in order, each with the place of its row."""

    def __init__(self, table: Dataset | SmallTable, spilled: Sequence[_Spilled] = ()) -> None:
        self.table = table  # columns: example (JSON), where
        self._spilled = tuple(spilled)  # held as long as the rows are

    @classmethod
    def build(cls, items: Iterable[tuple[str, Example]]) -> ExampleSet:
        """From (place, example); what is more than memory should hold goes to files, which go away with the rows."""
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
        rest = SmallTable({"example": [*lines], "where": [*places]}, KINDS)
        if not parts:
            return cls(rest if len(rest) < FEW_ROWS else _as_dataset(rest))
        from datasets import concatenate_datasets

        return cls(concatenate_datasets([*parts, *([_as_dataset(rest)] if lines else [])]), spilled)

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
        return map(from_json, self.lines())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def lines(self) -> Iterator[str]:
        """The examples as JSON."""
        if isinstance(self.table, SmallTable):
            yield from self.table["example"]
            return
        for batch in self.table.iter(batch_size=1000):
            assert isinstance(batch, dict)  # a list for each column
            yield from batch["example"]

    def where(self, i: int) -> str:
        """The place of example `i`."""
        return self.table[i]["where"]

    def select(self, rows: Iterable[int]) -> ExampleSet:
        """Some of the examples, in the order of `rows`; a row may come twice."""
        chosen = rows if isinstance(rows, Sequence) else list(rows)
        if isinstance(self.table, SmallTable) and len(chosen) >= FEW_ROWS:  # a row may be there many times
            return ExampleSet(_as_dataset(self.table).select(chosen))
        return ExampleSet(self.table.select(chosen), self._spilled)

    @property
    def few(self) -> bool:
        """Whether the table is a small one."""
        return isinstance(self.table, SmallTable)

    def dataset(self) -> Dataset:
        """The table of `datasets`."""
        return _as_dataset(self.table) if isinstance(self.table, SmallTable) else self.table


def _as_dataset(table: SmallTable) -> Dataset:
    from datasets import Dataset, Features, Value

    kinds = Features({name: Value("string") for name in KINDS})
    return Dataset.from_dict({name: table[name] for name in KINDS}, features=kinds)


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
