"""A text as the words that a tagging model reads, and words as a text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

WITHOUT_BLANKS = ("CJK", "HIRAGANA", "KATAKANA", "THAI")
JOINER = "\u200d"
FLAGS = ("\U0001f1e6", "\U0001f1ff")  # the letters of which two are a country's flag
SKINS = ("\U0001f3fb", "\U0001f3ff")


def stands_alone(c: str) -> bool:
    """Whether a character is one of a script that puts no blanks between its words."""
    return c >= "\u0e00" and unicodedata.name(c, "").startswith(WITHOUT_BLANKS)


def whole_characters(text: str) -> list[str]:
    """The text cut into what a reader takes for one character: a letter with its vowel signs and accents, an emoji with
    what is joined to it."""
    if text.isascii():
        return list(text)
    found: list[str] = []
    for c in text:
        if found and _belongs_to(found[-1], c):
            found[-1] += c
        else:
            found.append(c)
    return found


def _belongs_to(before: str, c: str) -> bool:
    """Whether `c` is a part of the character in front of it."""
    if before.isspace():
        return False
    if unicodedata.category(c)[0] == "M" or unicodedata.category(c) == "Cf" or SKINS[0] <= c <= SKINS[1]:
        return True
    if before[-1] == JOINER:
        return unicodedata.category(c)[0] == "S"
    return len(before) == 1 and FLAGS[0] <= before <= FLAGS[1] and FLAGS[0] <= c <= FLAGS[1]


def cut_into_words(text: str) -> tuple[str, ...]:
    """What blanks separate, and of that each character of Chinese, Japanese and Thai, and punctuation at both ends."""
    words: list[str] = []
    for chunk in text.split():
        spaced = "".join(f" {c} " if stands_alone(c[0]) else c for c in whole_characters(chunk))
        for part in spaced.split():
            characters = whole_characters(part)
            inner = [i for i, c in enumerate(characters) if unicodedata.category(c[0])[0] not in "PSC"]
            begin, end = (inner[0], inner[-1] + 1) if inner else (len(characters), len(characters))
            words += [*characters[:begin], *(["".join(characters[begin:end])] if inner else []), *characters[end:]]
    return tuple(words)


def join_words(words: Sequence[str], sentence: Sequence[str] | None = None) -> str:
    """The words as a text: with blanks between them, but for scripts that write none.

    Args:
        sentence: That they are a part of. It says whether words are single characters, with nothing between them;
            None where they are the sentence.
    """
    if all(len(whole_characters(word)) <= 1 for word in (words if sentence is None else sentence)):
        return "".join(words)
    text = ""
    for word in words:
        touches = not text or not word or (_ends_alone(text) and stands_alone(word[0]))
        text += word if touches else f" {word}"
    return text


def _ends_alone(text: str) -> bool:
    """Whether the last letter, with its combining marks, is a word by itself."""
    return stands_alone(next((c for c in reversed(text) if unicodedata.category(c)[0] != "M"), text[-1]))
