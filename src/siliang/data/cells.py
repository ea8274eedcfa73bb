"""The cells of a row: texts, and what is wrong with others."""

from __future__ import annotations

import json
import math
import re
from datetime import date, time, timedelta
from decimal import Decimal

from siliang.data.example import Example
from siliang.data.json_stream import WrittenFloat
from siliang.data.numbers import as_number
from siliang.data.text_files import INVISIBLE
from siliang.language import Bilingual, local
from siliang.secrets import shortened

Values = dict[str, object]
Result = Example | str  # an example, or what is wrong with the row

# what str.strip() takes for white space, and characters without a width
BLANKS = (
    " \t\r\n\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
) + INVISIBLE


class BadRow(Exception):  # noqa: N818  # the reader of the row catches it, and adds the place
    """A row that cannot be used.

    Attributes:
        text: What is wrong with it, without the place.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


def as_text(value: object, name: str = "") -> str:
    """A cell as text; None becomes an empty text.

    Args:
        name: The column, for the error.

    Raises:
        BadRow: It is a list, an object, bytes, NaN or infinite.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    listed = Bilingual("a list", "列表")
    kinds = {list: listed, tuple: listed, dict: Bilingual("an object", "对象"), bytes: Bilingual("bytes", "字节")}
    what: str | None = kinds.get(type(value))
    if isinstance(value, float) and not math.isfinite(value):
        what = "NaN" if math.isnan(value) else Bilingual("an infinite number", "无穷大")
    if what is None:
        return str(value)
    what_zh = local(what, "zh")
    if name:
        raise BadRow(Bilingual(f"has {what} in {name!r}", f"的 {name!r} 是{what_zh}"))
    raise BadRow(Bilingual(f"has {what} where text belongs", f"应为文本处是{what_zh}"))


def cell(values: Values, column: str) -> str:
    """A row's cell as text; an empty text if the row has no such column."""
    return as_text(values.get(column), column)


def as_json(value: object) -> str:
    """A value of the data as JSON text, its numbers as they were written.

    Raises:
        BadRow: It holds a value that JSON cannot express.
    """
    try:
        text = json.dumps(_with_marks(value), ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        shown = short(value)
        raise BadRow(
            Bilingual(
                f"holds what is not JSON (NaN, bytes ...): {shown}", f"含有 JSON 无法表示的值（NaN、字节等）：{shown}"
            )
        ) from None
    return MARKED.sub(r"\1", text)


MARKED = re.compile(r'"\\u0000([-+.0-9eE]+)\\u0000"')


def _with_marks(value: object) -> object:
    """The value with its numbers as marked texts, which json does not rewrite, and its dates as texts."""
    if isinstance(value, dict):
        return {name: _with_marks(held) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [_with_marks(held) for held in value]
    if isinstance(value, WrittenFloat | Decimal):
        return f"\0{value}\0" if math.isfinite(value) else float(value)
    return str(value) if isinstance(value, date | time | timedelta) else value


def short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return shortened(text, 60, " ...")


def given(value: object) -> bool:
    """Whether the field holds a value. Arrow and Parquet write null into fields that only other rows have."""
    return value is not None and not (isinstance(value, str | list | tuple | dict) and not value)


def is_blank(value: object) -> bool:
    """Whether a cell has nothing to read: null, empty, or a text of white space and invisible characters."""
    return not given(value) or (isinstance(value, str) and not value.strip(BLANKS))


def filled(values: Values, name: str) -> str:
    """A cell that must hold a text.

    Raises:
        BadRow: It is not there, holds something else, or is empty.
    """
    if name not in values:
        raise BadRow(Bilingual(f"has no field {name!r}", f"缺少字段 {name!r}"))
    text = as_text(values[name], name)
    if is_blank(text):
        raise BadRow(Bilingual(f"has an empty {name!r}", f"的 {name!r} 为空"))
    return text


def is_number(value: object) -> bool:
    """A number, or a text that is one."""
    return as_number(value.strip()) is not None if isinstance(value, str) else isinstance(value, int | float)
