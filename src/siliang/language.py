"""Messages in English and Chinese. Records, JSON and logs are always English; `local` chooses the language of printing.

Each message has both texts side by side in the code; tests/test_language.py checks that they show the same values.
"""

from __future__ import annotations

import os
import re
import unicodedata
from typing import Literal, Self

Language = Literal["en", "zh"]
CHINESE, MARKS = "[一-鿿“”（《]", "[，。；：、）？！]"


def language() -> Language:
    """The language of SILIANG_LANG, otherwise of the locale."""
    wanted = os.environ.get("SILIANG_LANG") or next(
        (value for name in ("LC_ALL", "LC_MESSAGES", "LANG") if (value := os.environ.get(name))), ""
    )
    return "zh" if wanted.lower().startswith("zh") else "en"


class Bilingual(str):
    """An English text with its Chinese translation.

    It is a `str`, so that records and JSON hold the English text in every locale.
    """

    zh: str

    def __new__(cls, en: str, zh: str) -> Self:
        text = super().__new__(cls, en)
        text.zh = zh
        return text

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        return type(self), (str(self), self.zh)


def local(text: str, language_: Language | None = None) -> str:
    """The text in the reader's language, if it is bilingual.

    Args:
        language_: None for `language()`.
    """
    return text.zh if isinstance(text, Bilingual) and (language_ or language()) == "zh" else str(text)


def both(en: str, zh: str) -> str:
    """The text in the reader's language, for a line that is printed at once."""
    return zh if language() == "zh" else en


def together(*parts: str) -> Bilingual:
    """The concatenation of texts in both languages; a part in one language is the same in both."""
    return Bilingual("".join(parts), "".join(local(part, "zh") for part in parts))


def joined(text: str) -> str:
    """The lines of a text joined into one line; without a blank between Chinese characters."""
    text = " ".join(text.split())
    return re.sub(f"(?<={CHINESE}) (?={CHINESE})|(?<={MARKS}) | (?={MARKS})", "", text)


def width(text: str) -> int:
    """The columns that a text takes in a terminal; a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text if not unicodedata.combining(c))


def padded(text: str, columns: int) -> str:
    """The text padded with blanks to `columns` columns."""
    return text + " " * (columns - width(text))


def filled(text: str, columns: int, indent: str = "") -> str:
    """The text wrapped to lines of `columns` columns; a line may end between any two Chinese characters."""
    lines, line = [], indent
    # a mark stays with the character before it, and an opening one with the character after it
    for part in re.findall(rf" +|[“（《\[]*(?:[一-鿿]|[^ 一-鿿“”（《，。；：、）？！]+)(?:{MARKS}|”)*\]*|.", text):
        if line.strip() and width(line + part.rstrip()) > columns:
            lines.append(line.rstrip())
            line = indent + part.lstrip()
        else:
            line += part
    return "\n".join([*lines, line.rstrip()])
