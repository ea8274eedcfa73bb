"""What the labels of a data set look like: one class, several labels, or numbers; and what separates several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite

from siliang.config import DataConfig, Problem
from siliang.data.cells import BLANKS, as_text, is_blank
from siliang.data.find_layout import find_layout
from siliang.data.label_cells import listed
from siliang.data.labels import FEW_ROWS, MARKS, joined
from siliang.data.numbers import as_number, has_comma_groups, has_decimal_comma, has_thousands, is_whole
from siliang.data.reading import Reading
from siliang.data.sources import open_source
from siliang.data.spec import DataSpec
from siliang.language import Bilingual
from siliang.secrets import short_repr

NO_NUMBERS = ("nan", "inf", "+inf", "-inf", "infinity", "-infinity")
FEW_PAIRS = 6  # of which all are in order by chance once in 64 times
MOST_ROWS = 20_000  # that are looked at; all rows are checked against the answer when they are read


@dataclass(frozen=True)
class LabelLook:
    """What labels are taken for.

    Attributes:
        separator: Between several labels of a text; None where a text is one label.
        why: In words.
    """

    problem: Problem
    separator: str | None
    why: str


def first_label_cells(data: DataConfig, spec: DataSpec) -> Iterator[object]:
    """The cells of the label column of the first training rows, as they are.

    Raises:
        DataError: The data cannot be read, or has no such column.
    """
    left = MOST_ROWS
    for source in data.train_sources:
        reading = Reading(data.header, data.encoding, data.separator)
        opened = open_source(source.path, reading)
        column = None
        for row in opened.rows(opened.part("train"), reading):
            if row.problem is not None:
                continue
            if column is None:
                _, columns = find_layout(source.layout or data.layout, row.values, spec, data.columns, source.path)
                column = columns.label
            yield row.values.get(column)
            left -= 1
            if not left:
                return


def look_at(cells: Sequence[object], labels: Sequence[str] | None = None) -> LabelLook:
    """What these labels are taken for. Never for ordered classes: that is not in the labels.

    Args:
        labels: The classes, where the settings name them.
    """
    there = [cell for cell in cells if cell is not None and not (isinstance(cell, str) and is_blank(cell))]
    lists = [cell for cell in there if isinstance(cell, list | tuple) or listed(cell) is not None]
    if len(lists) * 2 > len(there):
        shown = short_repr(next((cell for cell in lists if cell and cell != "[]"), lists[0]))
        return LabelLook(
            "several_labels", None, Bilingual(f"the labels are lists, such as {shown}", f"标签是列表，如 {shown}")
        )
    plain = [
        cell for cell in there if isinstance(cell, str | int | bool) or (isinstance(cell, float) and isfinite(cell))
    ]
    texts = [as_text(cell) for cell in plain]
    names = {text.strip(BLANKS) for text in texts}
    counted = {name for name in names if name.lower() not in NO_NUMBERS}
    if labels is None and len(counted) > 1 and all(as_number(name) is not None for name in counted):
        names = counted  # among numbers they are refused when the rows are read
    if labels is None and (commas := decimal_commas(names)):
        why = Bilingual(
            f"the labels are numbers with a decimal comma, such as {commas[0]}",
            f"标签是用逗号作小数点的数，如 {commas[0]}",
        )
        return LabelLook("number", None, why)
    thousands = sorted(filter(has_thousands, names))
    if labels is None and thousands and all(map(_is_a_number, names)):  # refused when the rows are read
        why = Bilingual(
            f"the labels are numbers with a separator of thousands, such as {thousands[0]}",
            f"标签是带千位分隔符的数，如 {thousands[0]}",
        )
        return LabelLook("number", None, why)
    if labels is None and (look := _comma_groups(names)) is not None:
        return look
    mark = separator(names, labels)
    if mark is not None:
        several = next(name for name in sorted(names) if mark in name)
        return LabelLook(
            "several_labels",
            mark,
            Bilingual(
                f"labels such as {short_repr(several)} are several, separated by {mark!r}",
                f"{short_repr(several)} 这样的标签由 {mark!r} 隔开，是多个标签",
            ),
        )
    numbers = [as_number(name) for name in names]
    numeric = bool(names) and None not in numbers and labels is None
    pointed = sorted(name for name, n in zip(names, numbers, strict=True) if n is not None and not n.is_integer())
    shown = ", ".join((pointed or sorted(names, key=lambda name: (len(name), name)))[:3])
    if numeric and pointed:
        why = Bilingual(f"the labels are numbers with decimals, such as {shown}", f"标签是带小数的数，如 {shown}")
        return LabelLook("number", None, why)
    # each number once is rather a number of the row: that is refused when the rows are read
    if numeric and len(texts) >= FEW_ROWS and len(texts) > len(names) > len(texts) / 2:
        why = Bilingual(
            f"the labels are {len(names):,} different numbers in {len(texts):,} rows, such as {shown}",
            f"{len(texts):,} 条样本中有 {len(names):,} 个不同的数，如 {shown}",
        )
        return LabelLook("number", None, why)
    n = len(labels or names)
    why = Bilingual(f"each row has one of {n:,} labels, such as {shown}", f"每条样本是 {n:,} 个标签之一，如 {shown}")
    if numeric and len(names) > 2 and all(map(is_whole, names)):
        why = Bilingual(
            f"each row has one of {n:,} whole numbers, such as {shown} (where their order counts: ordered)",
            f"每条样本是 {n:,} 个整数之一，如 {shown}（如果大小顺序有意义，请用 ordered）",
        )
    return LabelLook("one_label", None, why)


def _comma_groups(names: set[str]) -> LabelLook | None:
    """What labels such as "1,234,567" are, by all of the column: numbers, or three labels each. None where no label is
    like that, or some are neither."""
    grouped = sorted(filter(has_comma_groups, names))
    if not grouped or not all(_is_a_number(name) or has_comma_groups(name) for name in names):
        return None
    one, number = grouped[0], grouped[0].replace(",", "")
    if (reason := _why_several(names, grouped)) is not None:
        return LabelLook(
            "several_labels",
            ",",
            Bilingual(
                f"labels such as {one} are several, separated by ',', since {reason} (as a number, write {number})",
                f"{one} 这样的标签由 ',' 隔开，是多个标签，因为{reason.zh}（如果是数，请写成 {number}）",
            ),
        )
    return LabelLook(
        "number",
        None,
        Bilingual(
            f"the labels are numbers with a separator of thousands, such as {one}: their parts are no labels of other "
            "rows",
            f"标签是带千位分隔符的数，如 {one}：逗号之间的各部分不是其他样本的标签",
        ),
    )


def _why_several(names: set[str], grouped: list[str]) -> Bilingual | None:
    """Why the parts of labels such as "1,234,567" are labels; None where they are rather thousands."""
    cells = [name.lstrip("+-").split(",") for name in grouped]
    parts = {part for cell in cells for part in cell}
    if parts <= names:
        return Bilingual("each of their parts is a label of another row", "每一部分都是其他样本的标签")
    if any(len({*cell}) < len(cell) or any(part.startswith("0") for part in cell) for cell in cells):
        return None  # a label twice, or a number with leading zeros
    if len(cells) >= FEW_PAIRS and all(sorted(map(int, cell)) == [*map(int, cell)] for cell in cells):
        return Bilingual("their parts are in order", "各部分都按顺序排列")
    if len(parts) < len(cells):
        return Bilingual(
            f"{len(cells):,} of them have only {len(parts):,} different parts",
            f"其中 {len(cells):,} 个只有 {len(parts):,} 种不同的部分",
        )
    return None


def _is_a_number(name: str) -> bool:
    return as_number(name) is not None or has_decimal_comma(name) or has_thousands(name)


def decimal_commas(names: set[str]) -> list[str]:
    """Those of the labels that have a decimal comma, if all are numbers. Numbers of classes, joined with commas, are
    written in their order, and some of them alone, or more than two together."""
    found = sorted(name for name in names if has_decimal_comma(name))
    rest = names.difference(found)
    if not found or not all(as_number(name) is not None for name in rest):
        return []
    pairs = [tuple(map(int, name.split(","))) for name in found]
    in_order = len(pairs) >= FEW_PAIRS and all(a < b for a, b in pairs)
    known = rest >= {str(part) for pair in pairs for part in pair}
    return [] if in_order or known else found


def separator(names: set[str], labels: Sequence[str] | None = None) -> str | None:
    """What separates several labels in one text, if something does."""
    if labels is None:
        return joined(names)
    for mark in MARKS:
        parts = {part.strip(BLANKS) for name in names for part in name.split(mark)}
        if not names <= {*labels} and parts <= {*labels}:
            return mark
    return None
