"""Reads untrusted JSON: with limits on size, depth and digits, without duplicate names, and only printable text.

Rows of data have another reader, data/json_stream.py, which does not hold a whole file.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any, NoReturn

from siliang.language import Bilingual, local, together
from siliang.secrets import redacted, shortened
from siliang.terminal import json_escaped
from siliang.types import SiliangError, TextError, message_of

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 50
MAX_DIGITS = 40  # of an integer: tokenizers write 10**30 for "no limit"
SHOWN = 40  # characters of a value in an error
HALF = re.compile(r"\\u[dD][89a-fA-F]")


class JsonError(TextError):
    """The text is not JSON, or exceeds a limit."""


def read_json(path: Path, *, most_bytes: int = MAX_BYTES, foreign: bool = False) -> Any:
    """The value in a file.

    Args:
        most_bytes: A larger file is refused.
        foreign: As for `parse_json`.

    Raises:
        JsonError: It is not JSON in UTF-8, or exceeds a limit. `line` is the line, if it is known.
        OSError: The file cannot be read.
    """
    # without O_NONBLOCK, opening a pipe would block
    number = os.open(path, os.O_RDONLY | (0 if sys.platform == "win32" else os.O_NONBLOCK))
    with os.fdopen(number, "rb") as opened:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise JsonError(Bilingual("it is not a plain file", "不是普通文件"))
        content = opened.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise JsonError(Bilingual(f"it has more than {most_bytes:,} bytes", f"超过 {most_bytes:,} 字节"))
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonError(
            Bilingual("it is not UTF-8", "不是 UTF-8 编码"), content.count(b"\n", 0, error.start) + 1
        ) from None
    return parse_json(text, foreign=foreign)


DAMAGED = Bilingual("is damaged", "已损坏")


def read_values(
    path: Path,
    kind: type[SiliangError],
    problem: str = DAMAGED,
    *,
    missing: SiliangError | None = None,
    most_bytes: int = MAX_BYTES,
    foreign: bool = False,
) -> Any:
    """The value in a file, with errors for the user.

    Args:
        kind: The class of the error.
        problem: The words of the error for a file that is not JSON, after its name.
        missing: The error for a missing file, if it differs.
        most_bytes: As for `read_json`.
        foreign: As for `parse_json`.

    Raises:
        SiliangError: Of class `kind`, or `missing`: the file, its line, and the reason.
    """
    try:
        return read_json(path, most_bytes=most_bytes, foreign=foreign)
    except JsonError as error:
        place, why = error.place(path), message_of(error)
        raise kind(
            Bilingual(f"{place} {problem}: {why}.", f"{place} {local(problem, 'zh')}：{local(why, 'zh')}。")
        ) from None
    except OSError as error:
        if missing is not None and isinstance(error, FileNotFoundError):
            raise missing from None
        raise kind(
            Bilingual(
                f"{path} cannot be read: {error.strerror or error}.", f"{path} 无法读取：{error.strerror or error}。"
            )
        ) from None


def parse_json(text: str, *, foreign: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        foreign: The JSON may be another program's. Then the last of several values of one name counts, and NaN and
            Infinity are numbers. Otherwise both are errors.

    Raises:
        JsonError: It is not JSON, is nested too deeply, has a number with too many digits or out of range, or half of a
            character of UTF-16.
    """
    reader = _Reader(text)
    decoder = json.JSONDecoder(
        parse_int=reader.integer,
        parse_float=reader.number,
        parse_constant=None if foreign else reader.constant,
        object_pairs_hook=None if foreign else reader.mapping,
    )
    try:
        value = decoder.decode(text)
    except json.JSONDecodeError as error:
        raise JsonError(error.msg, error.lineno) from None
    except RecursionError:
        raise JsonError(Bilingual(f"nested more than {MAX_DEPTH} deep", f"嵌套超过 {MAX_DEPTH} 层")) from None
    _check_depth(value)
    if HALF.search(text) is not None:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise JsonError(
                Bilingual(
                    f"it holds half of a character, \\u{ord(error.object[error.start]):04x}",
                    f"含有半个字符 \\u{ord(error.object[error.start]):04x}",
                )
            ) from None
    return value


class _Reader:
    """Parses numbers and mappings for a decoder."""

    def __init__(self, text: str) -> None:
        self._text = text

    def integer(self, text: str) -> int:
        if len(text) > MAX_DIGITS:
            raise self._wrong(
                text, Bilingual(f"a number has more than {MAX_DIGITS} digits", f"有一个数超过 {MAX_DIGITS} 位")
            )
        return int(text)

    def number(self, text: str) -> float:
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise self._wrong(text, Bilingual("a number is out of range", "超出数的范围"))
        return number

    def constant(self, text: str) -> NoReturn:
        raise self._wrong(text, Bilingual("not a number of JSON", "不是 JSON 的数"))

    def mapping(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        values = dict(pairs)
        if len(values) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise JsonError(
                Bilingual(
                    f"{shortened(twice, SHOWN)!r} appears twice in one object",
                    f"{shortened(twice, SHOWN)!r} 在同一对象中出现了两次",
                )
            )
        return values

    def _wrong(self, text: str, why: str) -> JsonError:
        shown = shortened(text, SHOWN, f"... ({len(text):,} characters)")
        return JsonError(
            together(why, Bilingual(": ", "："), shown), self._text.count("\n", 0, self._text.find(text)) + 1
        )


def _check_depth(value: object) -> None:
    level = [value] if isinstance(value, dict | list) else []
    depth = 0
    while level:
        if (depth := depth + 1) > MAX_DEPTH:
            raise JsonError(Bilingual(f"nested more than {MAX_DEPTH} deep", f"嵌套超过 {MAX_DEPTH} 层"))
        inner = (v for outer in level for v in (outer.values() if isinstance(outer, dict) else outer))
        level = [v for v in inner if isinstance(v, dict | list)]


def dump_json(values: object, *, indent: int | None = None, sort_keys: bool = False, ascii_only: bool = False) -> str:
    """A JSON text of values. It decodes to the same values, except for secrets, which are redacted.

    Args:
        ascii_only: Escape all characters outside of ASCII.
    """
    text = json.dumps(redacted(values), indent=indent, sort_keys=sort_keys, ensure_ascii=ascii_only)
    return json_escaped(text)
