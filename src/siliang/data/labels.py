"""The names of classes and tags: which are one class written in two ways, and which columns hold no classes at all."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from siliang.data.cells import BadRow
from siliang.data.example import Example
from siliang.data.label_cells import SET, listed
from siliang.data.numbers import as_number, is_whole
from siliang.data.text_files import INVISIBLE
from siliang.language import Bilingual
from siliang.secrets import without_secrets

if TYPE_CHECKING:
    from siliang.data.spec import DataSpec

MOST_FOUND = 1000  # classes that the settings do not name
FEW_ROWS = 20  # below, a class for every other row says nothing
MISSING = frozenset({"nan", "none", "null", "na", "n/a", "<na>", "nat", "undefined", "-nan"})
TRUTHS = {"true": "1.0", "false": "0.0"}  # by their keys
QUOTES = "\"'`\u2018\u2019\u201c\u201d"


def alike_key(name: str) -> str:
    """The same for names that people read as one: but for blanks, invisible characters, quotes, upper case, wide and
    narrow forms, and the way a number is written."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    plain = unicodedata.normalize("NFKC", plain)
    shown = "".join(c for c in plain if c not in INVISIBLE and unicodedata.category(c) != "Cf")
    shown = " ".join(shown.split()).strip(QUOTES).strip()
    number = as_number(shown)
    return shown if number is None else repr(number + 0.0)


def alike(names: Iterable[str]) -> list[list[str]]:
    """The groups of names that look like one; of two classes written in two ways, true is 1 and false is 0."""
    keys = {name: alike_key(name) for name in names}
    truths = dict(TRUTHS) if set(keys.values()) <= {*TRUTHS, *TRUTHS.values()} else {}
    groups: dict[str, list[str]] = {}
    for name, key in keys.items():
        groups.setdefault(truths.get(key, key), []).append(name)
    return [sorted(group) for group in groups.values() if len(group) > 1]


def strange(names: Iterable[str]) -> list[str]:
    """Names that say that there is none, as a program writes a missing value, and names with blanks or invisible
    characters at their ends or in them."""
    return sorted(
        name
        for name in names
        if name.casefold().strip() in MISSING or name != name.strip() or any(c in INVISIBLE for c in name)
    )


def no_label(names: Collection[str]) -> str | None:
    """The name of a missing label: -1 among integers from 0, as in GLUE's test splits."""
    rest = {name for name in names if name != "-1"}
    numbered = "0" in rest and all(is_whole(name) and not name.startswith("-") for name in rest)
    return "-1" if numbered and len(rest) < len(names) else None


def find_labels(found: Collection[str], rows: int, spec: DataSpec, least: int) -> list[str]:
    """The classes, tags or labels of the training rows, in a stable order.

    Args:
        found: The names that occur in them.
        least: Fewer are nothing to learn.

    Raises:
        BadRow: They are no classes, or have no order that is known.
    """
    if problem := no_classes(found, rows, spec) if spec.named == "label" else None:
        raise BadRow(problem)
    n = len(found)
    if n > MOST_FOUND:
        raise BadRow(
            Bilingual(
                f"has {n:,} different values: these are not classes. If they are, list them in data.labels.",
                f"有 {n:,} 个不同的值：这不是类别。如果确实是，请在 data.labels 中列出。",
            )
        )
    if spec.several and not n:
        raise BadRow(
            Bilingual("has no label in any row: nothing to learn.", "的所有样本都没有标签：没有可学习的内容。")
        )
    if n < least and not spec.several:
        only = sorted(found)
        raise BadRow(
            Bilingual(f"has one class only, {only}: nothing to learn.", f"只有一个类别 {only}：没有可学习的内容。")
        )
    if not spec.ordered:
        return sort_labels(found)
    by_value = {name: as_number(name) for name in found}
    if None in by_value.values():
        shown = ", ".join(sorted(found)[:3])
        raise BadRow(
            Bilingual(
                f"holds names such as {shown}, whose order is not known: list them from the lowest to the highest in "
                "data.labels.",
                f"是 {shown} 这样的名称，顺序未知：请在 data.labels 中从低到高列出。",
            )
        )
    return sorted(by_value, key=lambda name: (by_value[name] or 0.0, name))


def sort_labels(found: Collection[str]) -> list[str]:
    """Names in a stable order: O first, then whole numbers by value (2 before 10), then words."""

    def key(name: str) -> tuple[int, int, str]:
        return (-1, 0, "") if name == "O" else (0, int(name), name) if is_whole(name) else (1, 0, name)

    return sorted(found, key=key)


def no_classes(found: Collection[str], rows: int, spec: DataSpec) -> str | None:
    """What a label column with these values holds instead of classes, if it does."""
    numbers = [as_number(name) for name in found]
    broken = [name for name, n in zip(found, numbers, strict=True) if n is not None and not n.is_integer()]
    if broken and None not in numbers and spec.several:
        shown = ", ".join(sorted(broken)[:3])
        return Bilingual(
            f"holds lists of numbers such as {shown}: a probability for each class is not learned. Write the name of "
            "the class, or the names of all that apply; where they are names, list them in data.labels.",
            f"是 {shown} 这样的数的列表：不能学习各类别的概率。请写出类别的名称，或所有适用的名称；"
            "如果它们就是名称，请在 data.labels 中列出。",
        )
    if broken and None not in numbers and not spec.ordered:
        shown = ", ".join(sorted(broken)[:3])
        return Bilingual(
            f"holds numbers such as {shown}: set {SET}=number to estimate them, or {SET}=ordered where they are few "
            "and in an order. Where they are classes, list them in data.labels.",
            f"是 {shown} 这样的数：要估计数值请设置 {SET}=number；若取值不多且有顺序，请设置 {SET}=ordered。"
            "如果它们是类别，请在 data.labels 中列出。",
        )
    if spec.several:
        return None
    if broken and None in numbers and not spec.ordered:
        names = sorted(name for name, n in zip(found, numbers, strict=True) if n is None)
        shown, others = ", ".join(sorted(broken)[:3]), ", ".join(names[:3])
        return Bilingual(
            f"holds numbers such as {shown} beside names such as {others}: correct what is wrong. Where all are "
            "classes, list them in data.labels.",
            f"既有 {shown} 这样的数，又有 {others} 这样的名称：请改正写错的部分。如果都是类别，请在 data.labels 中"
            "列出。",
        )
    lists = [name for name in found if listed(name) is not None]
    if len(lists) * 2 > len(found):
        shown = min(lists)
        return Bilingual(
            f"holds lists such as {shown!r}: several labels for one text; set {SET}=several_labels.",
            f"是 {shown!r} 这样的列表：一段文本有多个标签；请设置 {SET}=several_labels。",
        )
    if rows >= FEW_ROWS and len(found) * 2 > rows:
        shown = ", ".join(map(repr, sorted(found)[:3]))
        number = Bilingual("", "")
        if None not in numbers:
            number = Bilingual(f", or set {SET}=number to estimate them", f"，或设置 {SET}=number 来估计数值")
        return Bilingual(
            f"has {len(found):,} different values in {rows:,} rows, such as {shown}: these are not classes. Name the "
            f"right column with data.columns.label{number}.",
            f"在 {rows:,} 条样本中有 {len(found):,} 个不同的值，如 {shown}：这不是类别。请用 data.columns.label "
            f"指定正确的列{number.zh}。",
        )
    return None


MARKS = (",", ";", "|", "、", "，", "；", "/", " ")  # that separate several labels


def joined(found: Collection[str]) -> str | None:
    """Returns the separator if the labels are several classes joined in one cell.

    "a,b" is two classes where "a" and "b" are labels too, or where most labels hold the separator.
    """
    for mark in MARKS:
        several = [name for name in found if mark in name.strip()]
        parts = {part.strip() for name in found for part in name.split(mark)}
        known = all(part in found for part in parts)
        if len(several) < (1 if known else 2) or len(parts) >= len(found) or not all(parts):
            continue
        if mark == " " and not all(map(is_whole, parts)):  # words have blanks between them
            continue
        if len(several) * 2 > len(found) or known:
            return mark
    return None


def with_known_part(found: Collection[str]) -> tuple[str, list[str]] | None:
    """The mark that separates some names into parts of which one is a name too, and these names: "a|b" beside "a". None
    where there is no such name."""
    for mark in MARKS:
        if mark in " /":  # words, and a class within another: "animal/dog" beside "animal"
            continue
        several = [name for name in found if mark in name]
        parts = {name: [part.strip() for part in name.split(mark)] for name in several}
        if names := [name for name in several if all(parts[name]) and any(part in found for part in parts[name])]:
            return mark, sorted(names)
    return None


def known_class(made: Example, labels: list[str], by_number: bool, what: str) -> Example | str:
    """The example, with numbers turned into names where that is how the data writes its classes; or what is wrong."""
    if by_number and all(is_whole(n) and 0 <= int(n) < len(labels) for n in made.classes):
        return made.with_classes(tuple(labels[int(n)] for n in made.classes))
    names = [name if name in labels else _as_written(name, labels) for name in made.classes]
    for name in names:
        if name not in labels:
            near = next((known for known in labels if alike_key(known) == alike_key(name)), None)
            hint = "" if near is None else f"; it looks like {near!r}"
            shown = ", ".join(labels[:20]) + (" ..." if len(labels) > 20 else "")
            hint_zh = "" if near is None else f"；与 {near!r} 相似"
            what_zh = {"label": "标签", "tag": "标注"}[what]
            return Bilingual(
                f"has the {what} {name!r}, which is not one of {shown}{hint}",
                f"的{what_zh} {name!r} 不是 {shown} 之一{hint_zh}",
            )
    return made.with_classes(tuple(names))


def _as_written(name: str, labels: list[str]) -> str:
    """A class that is a secret, as the labels of a run's record have it."""
    hidden = without_secrets(name)
    return hidden if labels.count(hidden) == 1 else name
