"""A row of the data, and how files are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from siliang.language import Bilingual


@dataclass(frozen=True)
class DataRow:
    """One row of the data.

    Attributes:
        where: `file:line`, or `source, row n` where lines mean nothing.
        problem: Why it cannot be used; None for a row that was read.
    """

    values: dict[str, object]
    where: str
    problem: str | None = None


@dataclass
class Reading:
    """How files are read, and what was noticed on the way.

    Attributes:
        header: Column names of a csv or tsv file without a header line.
        encoding: Of text files; `auto` finds it.
        separator: Of csv and tsv files; `auto` finds it.
        tagged: A .txt file holds a word and its tag a line.
        keeps_empty: An empty line of a .txt file is a row without text.
        columns: Of the tables that were read, also of those without rows.
        notes: What was guessed or ignored, one line each.
        doubts: What may have been read in an unintended way, one line each.
    """

    header: list[str] | None = None
    encoding: str = "auto"
    separator: str = "auto"
    tagged: bool = False
    keeps_empty: bool = False
    columns: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    def add_columns(self, names: Iterable[str]) -> None:
        self.columns += [name for name in names if name not in self.columns]

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)


def columns_in_words(layouts: Mapping[str, Mapping[str, str]], unused: list[str]) -> Bilingual:
    """Which columns were taken, by the part of its layout that each became, and which were not."""
    taken, taken_zh = [], []
    for layout, columns in layouts.items():
        parts = [repr(part) if part == name else f"{part} from {name!r}" for part, name in columns.items()]
        parts_zh = [repr(part) if part == name else f"{part} 取自 {name!r}" for part, name in columns.items()]
        taken.append(f"{layout}: {', '.join(parts)}")
        taken_zh.append(f"{layout}：{'、'.join(parts_zh)}")
    rest, rest_zh = "", ""
    if unused:
        names = ", ".join(map(repr, unused))
        rest, rest_zh = f"; not used: {names}", f"；未使用：{names}"
    return Bilingual(f"{'; '.join(taken)}{rest}", f"{'；'.join(taken_zh)}{rest_zh}")
