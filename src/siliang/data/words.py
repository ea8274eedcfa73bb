"""A text as the words that a tagging model reads, and words as a text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

WITHOUT_BLANKS = ("CJK", "HIRAGANA", "KATAKANA", "THAI")


def stands_alone(c: str) -> bool:
    """Whether a character is one of a script that puts no blanks between its words."""
    return c >= "\u0e00" and unicodedata.name(c, "").startswith(WITHOUT_BLANKS)


def cut_into_words(text: str) -> tuple[str, ...]:
    """What blanks separate, and of that each character of Chinese, Japanese and Thai, and punctuation at both ends."""
    words: list[str] = []
    for chunk in text.split():
        spaced = "".join(f" {c} " if stands_alone(c) else c for c in chunk)
        for part in spaced.split():
            front, middle, back = re.fullmatch(r"([^\w]*)(.*?)([^\w]*)", part, re.DOTALL).groups()  # type: ignore[union-attr]
            words += [*front, *([middle] if middle else []), *back]
    return tuple(words)


def join_words(words: Sequence[str]) -> str:
    """The words as a text: with blanks between them, but for scripts that write none."""
    if all(len(word) <= 1 for word in words):
        return "".join(words)
    text = ""
    for word in words:
        touches = not text or not word or (stands_alone(text[-1]) and stands_alone(word[0]))
        text += word if touches else f" {word}"
    return text
