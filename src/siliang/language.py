"""The two languages of what people read. Records, JSON and logs stay English; `local` chooses where a text is printed.

Both texts of a message stand beside each other, where it is made; tests/test_language.py holds them to the same values.
"""

from __future__ import annotations

import os
import re
import unicodedata
from typing import Literal, Self

Language = Literal["en", "zh"]
CHINESE, MARKS = "[一-鿿“”（《]", "[，。；：、）？！]"


def language() -> Language:
    """SILIANG_LANG, or else the locale's language."""
    wanted = os.environ.get("SILIANG_LANG") or next(
        (value for name in ("LC_ALL", "LC_MESSAGES", "LANG") if (value := os.environ.get(name))), ""
    )
    return "zh" if wanted.lower().startswith("zh") else "en"


class Bilingual(str):
    """An English text that carries the same in Chinese.

    It is a `str` for all that only knows English, so that a record or JSON holds the English text in every locale.
    """

    zh: str

    def __new__(cls, en: str, zh: str) -> Self:
        text = super().__new__(cls, en)
        text.zh = zh
        return text

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        return type(self), (str(self), self.zh)


def local(text: str, language_: Language | None = None) -> str:
    """The text in the reader's language, where it carries both.

    Args:
        language_: None for `language()`.
    """
    return text.zh if isinstance(text, Bilingual) and (language_ or language()) == "zh" else str(text)


def both(en: str, zh: str) -> str:
    """One of two texts that say the same, for a line that is printed at once."""
    return zh if language() == "zh" else en


def together(*parts: str) -> Bilingual:
    """Texts one after the other, in both languages; a part in one language is the same in both."""
    return Bilingual("".join(parts), "".join(local(part, "zh") for part in parts))


def joined(text: str) -> str:
    """A text of several lines in one; between Chinese characters a line's end is not a blank."""
    text = " ".join(text.split())
    return re.sub(f"(?<={CHINESE}) (?={CHINESE})|(?<={MARKS}) | (?={MARKS})", "", text)


def width(text: str) -> int:
    """The columns that a text takes in a terminal; a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text if not unicodedata.combining(c))


def padded(text: str, columns: int) -> str:
    """The text with blanks behind it, up to so many columns."""
    return text + " " * (columns - width(text))


def filled(text: str, columns: int, indent: str = "") -> str:
    """The text in lines of so many columns; between Chinese characters a line may end anywhere."""
    lines, line = [], indent
    # a mark stays with what is in front of it, and an opening one with what is behind it
    for part in re.findall(rf" +|[“（《\[]*(?:[一-鿿]|[^ 一-鿿“”（《，。；：、）？！]+){MARKS}*\]*|.", text):
        if line.strip() and width(line + part.rstrip()) > columns:
            lines.append(line.rstrip())
            line = indent + part.lstrip()
        else:
            line += part
    return "\n".join([*lines, line.rstrip()])
