"""How a row's label cell is read: as one label, as several, or as a number."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from siliang.data.cells import BLANKS, BadRow, Values, as_text, filled, is_blank
from siliang.data.list_cells import held_in_text
from siliang.data.numbers import as_number, has_comma_groups, has_decimal_comma, has_thousands, with_point
from siliang.language import Bilingual
from siliang.secrets import short_repr, shortened

# The label of a row, or all of its labels, from its values and the column's name; raises BadRow.
LabelReader = Callable[[Values, str], str | tuple[str, ...]]
SET = "classification.problem"
LONGEST_LIST = 10_000  # characters


def one_label(values: Values, column: str) -> str:
    """The text of a cell that must not be empty.

    Raises:
        BadRow: It is missing, empty, or a list.
    """
    if isinstance(values.get(column), list | tuple):
        raise BadRow(
            Bilingual(
                f"has a list in {column!r}: several labels for one text; set {SET}=several_labels",
                f"的 {column!r} 是列表：一段文本有多个标签；请设置 {SET}=several_labels",
            )
        )
    return filled(values, column)


def several_labels(values: Values, column: str, separator: str | None) -> tuple[str, ...]:
    """The labels of a list, of a text that is a list, or of a text with a separator; none of an empty cell.

    Args:
        separator: None: a text is one label.

    Raises:
        BadRow: The field is missing, a label is empty or no text, or a label is there twice.
    """
    if column not in values:
        raise BadRow(Bilingual(f"has no field {column!r}", f"缺少字段 {column!r}"))
    value = values[column]
    if value is None or (isinstance(value, str) and is_blank(value)):
        return ()
    parts: Sequence[object] | None = value if isinstance(value, list | tuple) else listed(value)
    if parts is None:
        text = as_text(value, column)
        parts = [text] if separator is None else [part.strip(BLANKS) for part in text.split(separator)]
    names = tuple(as_text(part, column) for part in parts)
    if any(map(is_blank, names)):
        raise BadRow(
            Bilingual(
                f"has an empty label in {column!r}: {short_repr(value)}",
                f"的 {column!r} 中有空标签：{short_repr(value)}",
            )
        )
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        flags = set(names) <= {"0", "1", "true", "false", "0.0", "1.0"}
        why = Bilingual("write each label once", "每个标签只写一次")
        if flags:
            why = Bilingual(
                "it looks like a 0 or 1 for each label: write the names of the labels that are 1",
                "看起来是逐个标签的 0 或 1：请写出值为 1 的标签的名称",
            )
        raise BadRow(
            Bilingual(f"has {twice!r} twice in {column!r}: {why}", f"的 {column!r} 中 {twice!r} 出现两次：{why.zh}")
        )
    return names


def a_number(values: Values, column: str) -> str:
    """The text of a number, which may have a decimal comma.

    Raises:
        BadRow: It is missing, or something else.
    """
    if isinstance(cells := values.get(column), list | tuple) and all(isinstance(part, int | float) for part in cells):
        raise BadRow(
            Bilingual(
                f"has a list of {len(cells)} numbers in {column!r}, and {SET} = number takes one number",
                f"的 {column!r} 是 {len(cells)} 个数的列表，而 {SET} = number 只取一个数",
            )
        )
    if isinstance(values.get(column), list | tuple):
        raise BadRow(
            Bilingual(
                f"has a list in {column!r}, and {SET} = number takes one number; set {SET}=several_labels",
                f"的 {column!r} 是列表，而 {SET} = number 只取一个数；请设置 {SET}=several_labels",
            )
        )
    text = filled(values, column).strip(BLANKS)
    if as_number(with_point(text)) is None:
        shown = shortened(text, 40)
        if has_decimal_comma(text):
            point, whole = text.replace(",", "."), text.replace(",", "")
            raise BadRow(
                Bilingual(
                    f"has {shown!r} in {column!r}, which may be {point} or {whole}: write it in one of these ways",
                    f"的 {column!r} 是 {shown!r}，可能是 {point}，也可能是 {whole}：请写成其中一种",
                )
            )
        if has_comma_groups(text):
            plain = text.replace(",", "")
            raise BadRow(
                Bilingual(
                    f"has {shown!r} in {column!r}, a number with a separator of thousands: write it as {plain}; where "
                    "it is several labels, set classification.label_separator=','",
                    f"的 {column!r} 是 {shown!r}，是带千位分隔符的数：请写成 {plain}；如果是多个标签，请设置 "
                    "classification.label_separator=','",
                )
            )
        if re.fullmatch(r"[+-]?[0-9]{1,3}([ \xa0\u2009\u202f'’][0-9]{3})+([.,][0-9]+)?", text):
            plain = re.sub(r"[ \xa0\u2009\u202f'’]", "", text).replace(",", ".")
            raise BadRow(
                Bilingual(
                    f"has {shown!r} in {column!r}, a number with marks between its thousands: write it as {plain}",
                    f"的 {column!r} 是 {shown!r}，是带千位分隔符的数：请写成 {plain}",
                )
            )
        if has_thousands(text):
            mark = next(c for c in text if c in ".,")
            plain = text.replace(mark, "").replace(",", ".")
            raise BadRow(
                Bilingual(
                    f"has {shown!r} in {column!r}, a number with a separator of thousands: write it as {plain}",
                    f"的 {column!r} 是 {shown!r}，是带千位分隔符的数：请写成 {plain}",
                )
            )
        raise BadRow(
            Bilingual(
                f"has {shown!r} in {column!r}, and {SET} = number takes a number; for names, set {SET}=one_label",
                f"的 {column!r} 是 {shown!r}，而 {SET} = number 只取数值；若是名称，请设置 {SET}=one_label",
            )
        )
    return text


def listed(value: object) -> list[object] | None:
    """The items of a text that is a list of labels; None for anything else."""
    found = held_in_text(value, longest=LONGEST_LIST)
    if not isinstance(found, list) or any(isinstance(part, list | dict | tuple | set) for part in found):
        return None
    return found
