"""JSON read piece by piece: lines of objects, and lists of objects that need not fit into memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from siliang.types import DataError

CHUNK_BYTES = 4 * 2**20

Item = tuple[str, Any, str | None]  # place, value, problem


def json_lines(path: Path) -> Iterator[Item]:
    """One value a line; a line that is not JSON comes with its problem."""
    with path.open("rb") as opened:
        for number, raw in enumerate(opened, start=1):
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{where}: not UTF-8 text. Save the file as UTF-8.") from None
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                yield where, value, _half_a_character(value) if _may_be_half(line) else None
            except (ValueError, RecursionError) as error:
                yield where, None, f"not valid JSON: {_reason(error)}"


def json_list(path: Path) -> Iterator[Item]:
    """The items of a list, each with the line on which it begins, or, where that is not its own line, its number; also
    SQuAD's {"data": [...]}.

    Raises:
        DataError: It is not JSON, or not a list.
    """
    with path.open("rb") as opened:
        text = _Text(path, opened)
        text.skip(" \t\r\n")
        if text.peek() == "[":
            yield from _items(text, path)
            return
    yield from _whole(path)


def _items(text: _Text, path: Path) -> Iterator[Item]:
    text.position += 1
    decoder = json.JSONDecoder()
    number, ended_on = 0, text.line
    while True:
        text.skip(" \t\r\n,")
        if text.peek() == "]":
            text.position += 1
            text.skip(" \t\r\n")
            if text.peek():
                raise DataError(f"{path}:{text.line}: not valid JSON: there is more after the end of the list.")
            return
        line = text.line
        try:
            value, suspect = text.decode(decoder)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{line + error.lineno - 1}: not valid JSON: {error.msg}.") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: not valid JSON: {_reason(error)}.") from None
        number += 1
        problem = _half_a_character(value) if suspect else None
        yield f"{path}:{line}" if line > ended_on else f"{path}, row {number}", value, problem
        ended_on = text.line


def _whole(path: Path) -> Iterator[Item]:
    """A file that holds one object: SQuAD's nested lists, or a list under the name `data`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = " It looks like one object a line: name it .jsonl." if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}.{hint}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text. Save the file as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {_reason(error)}.") from None
    items = value.get("data") if isinstance(value, dict) else None
    if not isinstance(items, list):
        raise DataError(f"{path} must hold a list of objects: [{{...}}, {{...}}].")
    number = 0
    for item in items:
        try:
            rows = _squad(item) if isinstance(item, dict) and "paragraphs" in item else [item]
        except (KeyError, TypeError) as error:
            rows = [f"an article of SQuAD without {error}"]
        for row in rows:
            number += 1
            yield f"{path}, row {number}", row, _half_a_character(row)


def _may_be_half(text: str) -> bool:
    return "\\ud" in text or "\\uD" in text


def _half_a_character(value: Any) -> str | None:
    """JSON may name one of the two halves of which UTF-16 makes a character; no text file can hold it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"holds half of a character, \\u{ord(error.object[error.start]):04x}"
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return getattr(error, "msg", "a number has too many digits")  # the only other thing that json refuses


def _squad(article: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"context": p["context"], **question} for p in article["paragraphs"] for question in p["qas"]]


class _Text:
    """A file's text, of which only what is being looked at is in memory."""

    def __init__(self, path: Path, opened: BinaryIO) -> None:
        self._path, self._bytes = path, opened
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._ended = "", False
        self.position = 0
        self.line = 1  # of `position`, once `skip` has run

    def peek(self) -> str:
        return self._text[self.position : self.position + 1] if self._here(1) else ""

    def skip(self, characters: str) -> None:
        """Goes to the next character that is none of these; counts the lines on the way."""
        while (c := self.peek()) and c in characters:
            self.line += c == "\n"
            self.position += 1

    def decode(self, decoder: json.JSONDecoder) -> tuple[Any, bool]:
        """The value at the position, and whether it may hold half of a character."""
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self.position)
                break
            except json.JSONDecodeError as error:
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
        raw = self._bytes.read(CHUNK_BYTES)
        self._ended = not raw
        try:
            fresh = self._decoder.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n", self.position) + raw[: error.start].count(b"\n")
            raise DataError(f"{self._path}:{line}: not UTF-8 text. Save the file as UTF-8.") from None
        self._text, self.position = self._text[self.position :] + fresh, 0
        return not self._ended
