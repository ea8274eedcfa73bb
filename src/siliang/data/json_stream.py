"""JSON read piece by piece: lines of objects, and lists of objects that need not fit into memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from siliang.data.text_files import MOST_ROW, TextFile
from siliang.language import Bilingual, local
from siliang.secrets import shortened
from siliang.types import DataError, message_of

CHUNK_BYTES = 4 * 2**20
MOST_WHOLE = 2**28  # characters of a file that is one object, and is read whole
MAX_DIGITS = 300  # of a whole number, which thus has a value as a float
SHOWN = 40  # characters of a number in an error
BLANK = " \t\r\n"

Item = tuple[str, object, str | None]  # place, value, problem


class WrittenFloat(float):
    """A number with a point or an exponent, whose text is what the file says: 0.10 stays 0.10."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        made = super().__new__(cls, text)
        made.text = text
        return made

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[type[WrittenFloat], tuple[str]]:
        return WrittenFloat, (self.text,)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise TwiceError(name)
    return made


class TwiceError(ValueError):
    """An object that has a name twice: one of the two values would be lost."""

    def __init__(self, name: str) -> None:
        super().__init__(Bilingual(f"an object has the name {name!r} twice", f"有一个对象含有两个 {name!r}"))


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise NumberError(Bilingual(f"a number has more than {MAX_DIGITS} digits", f"有一个数超过 {MAX_DIGITS} 位"))
    return int(text)


def _number(text: str) -> WrittenFloat:
    number = WrittenFloat(text)
    if math.isinf(number):
        raise NumberError(
            Bilingual(
                f"{shortened(text, SHOWN)} is beyond the range of numbers", f"{shortened(text, SHOWN)} 超出数的范围"
            )
        )
    return number


class NumberError(ValueError):
    """A number with which nothing can be computed."""


DECODER = json.JSONDecoder(parse_int=_whole_number, parse_float=_number, object_pairs_hook=_object)


def json_lines(file: TextFile, name: str | Path) -> Iterator[Item]:
    """One value a line; a line that is not JSON comes with its problem.

    Args:
        name: The file's name in the places.

    Raises:
        DataError: It is a list, or an object over several lines.
    """
    first = True
    for number, line in file.lines():
        if not line.strip():
            continue
        if first and line.strip(BLANK).startswith("["):
            raise DataError(
                Bilingual(
                    f"{name} begins with a list, as a .json file does: name it .json (a .jsonl file is one "
                    "object a line).",
                    f"{name} 以列表开头，像 .json 文件：请改名为 .json（.jsonl 文件每行一个对象）。",
                )
            )
        if first and line.strip(BLANK) == "{":
            raise DataError(
                Bilingual(
                    f"{name}: its objects go over several lines; a .jsonl file holds one object a line.",
                    f"{name}：对象跨了多行；.jsonl 文件每行一个对象。",
                )
            )
        first = False
        where = f"{name}:{number}"
        try:
            value = DECODER.decode(line.strip(BLANK))
            yield where, value, half_a_character(value) if _may_be_half(line) else None
        except (ValueError, RecursionError) as error:
            why = _reason(error)
            yield where, None, Bilingual(f"not valid JSON: {why}", f"不是有效的 JSON：{local(why, 'zh')}")


def is_lines(file: TextFile) -> bool:
    """Whether the file has one object per line; its name does not matter."""
    filled = (line.strip(BLANK) for _, line in file.lines() if line.strip(BLANK))
    first, second = next(filled, ""), next(filled, "")
    filled.close()
    try:
        return all(isinstance(DECODER.decode(line), dict) for line in (first, second))
    except (ValueError, RecursionError):
        return False


def json_list(file: TextFile, name: str | Path) -> Iterator[Item]:
    """The items of a list, each with the line on which it begins, or, where that is not its own line, its number; also
    SQuAD's {"data": [...]}, whose questions have an id.

    Raises:
        DataError: It is not JSON, or not a list.
    """
    with file.open() as opened:
        text = _Text(opened)
        text.skip()
        if text.peek() == "[":
            yield from _items(text, name)
            return
    yield from _whole(file, name)


def _items(text: _Text, name: str | Path) -> Iterator[Item]:
    text.position += 1
    number, ended_on = 0, text.line
    text.skip()
    while text.peek() != "]":
        line = text.line
        try:
            value, suspect = text.decode()
        except json.JSONDecodeError as error:
            raise DataError(
                Bilingual(
                    f"{name}:{line + error.lineno - 1}: not valid JSON: {error.msg}.",
                    f"{name}:{line + error.lineno - 1}：不是有效的 JSON：{error.msg}。",
                )
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(
                Bilingual(
                    f"{name}:{line}: not valid JSON: {_reason(error)}.",
                    f"{name}:{line}：不是有效的 JSON：{local(_reason(error), 'zh')}。",
                )
            ) from None
        number += 1
        problem = half_a_character(value) if suspect else None
        yield f"{name}:{line}" if line > ended_on else f"{name}, row {number}", value, problem
        ended_on = text.line
        text.skip()
        if text.peek() == ",":
            text.position += 1
            text.skip()
            if text.peek() == "]":
                raise DataError(
                    Bilingual(
                        f"{name}:{text.line}: not valid JSON: a comma with nothing after it.",
                        f"{name}:{text.line}：不是有效的 JSON：逗号之后没有内容。",
                    )
                )
        elif text.peek() != "]":
            missing = (
                Bilingual("a comma is missing between two items", "两项之间缺少逗号")
                if text.peek()
                else Bilingual("the list does not end", "列表没有结束")
            )
            raise DataError(
                Bilingual(
                    f"{name}:{text.line}: not valid JSON: {missing}.",
                    f"{name}:{text.line}：不是有效的 JSON：{local(missing, 'zh')}。",
                )
            )
    text.position += 1
    text.skip()
    if text.peek():
        raise DataError(
            Bilingual(
                f"{name}:{text.line}: not valid JSON: there is more after the end of the list.",
                f"{name}:{text.line}：不是有效的 JSON：列表结束之后还有内容。",
            )
        )


def _whole(file: TextFile, name: str | Path) -> Iterator[Item]:
    """A file that holds one object: SQuAD's nested lists, or a list under the name `data`."""
    with file.open() as opened:
        content = opened.read(MOST_WHOLE + 1)
    if len(content) > MOST_WHOLE:
        raise DataError(
            Bilingual(
                f"{name} is one object of more than {MOST_WHOLE:,} characters: write a list of objects, or one a line.",
                f"{name} 是一个超过 {MOST_WHOLE:,} 个字符的对象：请写成对象的列表，或每行一个对象。",
            )
        )
    try:
        value = DECODER.decode(content)
    except json.JSONDecodeError as error:
        hint = Bilingual("", "")
        if error.msg == "Extra data":
            hint = Bilingual(
                " It looks like one object a line: name it .jsonl.", "它像是每行一个对象：请改名为 .jsonl。"
            )
        raise DataError(
            Bilingual(
                f"{name}:{error.lineno}: not valid JSON: {error.msg}.{hint}",
                f"{name}:{error.lineno}：不是有效的 JSON：{error.msg}。{hint.zh}",
            )
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            Bilingual(
                f"{name}: not valid JSON: {_reason(error)}.",
                f"{name}：不是有效的 JSON：{local(_reason(error), 'zh')}。",
            )
        ) from None
    items = value.get("data") if isinstance(value, dict) else None
    if not isinstance(items, list):
        lists = [key for key, held in value.items() if isinstance(held, list)] if isinstance(value, dict) else []
        found = Bilingual("", "")
        if lists:
            found = Bilingual(
                f" It holds one object, with a list under {', '.join(map(repr, lists))}.",
                f"它是一个对象，{'、'.join(map(repr, lists))} 下有列表。",
            )
        if isinstance(value, dict) and value and all(isinstance(held, dict) for held in value.values()):
            found = Bilingual(
                ' It holds columns, as pandas writes them: df.to_json(path, orient="records") writes rows.',
                '它按列存放，像 pandas 写的那样：df.to_json(path, orient="records") 按行写。',
            )
        raise DataError(
            Bilingual(
                f"{name} must hold a list of objects: [{{...}}, {{...}}].{found}",
                f"{name} 应为对象的列表：[{{...}}, {{...}}]。{found.zh}",
            )
        )
    number = 0
    for item in items:
        try:
            rows = _squad(item) if isinstance(item, dict) and "paragraphs" in item else [item]
        except (KeyError, TypeError, AttributeError) as error:
            rows = [f"an article of SQuAD without {error}"]
        for row in rows:
            number += 1
            nested = isinstance(item, dict) and "paragraphs" in item
            own = row.get("id") if nested and isinstance(row, dict) else None
            place = f"{name}, row {number}" if own is None else f"{name}, id {own}"
            yield place, row, half_a_character(row)


def _may_be_half(text: str) -> bool:
    return "\\ud" in text or "\\uD" in text


def half_a_character(value: object) -> str | None:
    """JSON may name one of the two halves of which UTF-16 makes a character; no text file can hold it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        return Bilingual(f"holds half of a character, {half}", f"含有半个字符 {half}")
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return Bilingual("nested too deeply", "嵌套过深")
    return getattr(error, "msg", message_of(error))


def _squad(article: dict[str, Any]) -> list[dict[str, object]]:
    return [{"context": p["context"], **question} for p in article["paragraphs"] for question in p["qas"]]


class _Text:
    """A file's text, of which only what is being looked at is in memory."""

    def __init__(self, opened: TextIO) -> None:
        self._opened = opened
        self._text, self._ended = "", False
        self.position = 0
        self.line = 1  # of `position`, once `skip` has run

    def peek(self) -> str:
        return self._text[self.position : self.position + 1] if self._here(1) else ""

    def skip(self) -> None:
        """Goes to the next character that is not blank; counts the lines on the way."""
        while (c := self.peek()) and c in BLANK:
            self.line += c == "\n"
            self.position += 1

    def decode(self) -> tuple[object, bool]:
        """The value at the position, and whether it may hold half of a character."""
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self.position)
                if end < len(self._text) or self._ended:
                    break
                self._more()  # a number at the end of the read part may continue
            except json.JSONDecodeError as error:
                if len(self._text) - self.position > MOST_ROW:
                    raise ValueError(
                        Bilingual(
                            f"an item does not end within {MOST_ROW:,} characters",
                            f"有一项超过 {MOST_ROW:,} 个字符仍未结束",
                        )
                    ) from None
                if not self._more():
                    rest = self._text[self.position :]
                    raise json.JSONDecodeError(error.msg, rest, min(error.pos - self.position, len(rest))) from None
        self.line += self._text.count("\n", self.position, end)
        suspect = _may_be_half(self._text[self.position : end])
        self.position = end
        return value, suspect

    def _here(self, n: int) -> bool:
        while len(self._text) - self.position < n:
            if not self._more():
                return False
        return True

    def _more(self) -> bool:
        if self._ended:
            return False
        fresh = self._opened.read(CHUNK_BYTES)
        self._ended = not fresh
        self._text, self.position = self._text[self.position :] + fresh, 0
        return not self._ended
