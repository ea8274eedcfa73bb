"""What a chat template makes of a conversation: texts with placeholders, and the entries cut out of them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

from siliang.data.chat_messages import CLOSE, OPEN
from siliang.data.messages import Conversation
from siliang.data.templates import BORDER, Piece

PLACE = re.compile(f"{OPEN}(\\d+){CLOSE}")


class View(NamedTuple):
    """The text of a conversation, or of its first turns.

    Attributes:
        spans: (begin, end) of each answer; its end marker is inside or directly behind. None: it was not found.
        alone: By answer, the text up to it, when it is the last.
        kept: By answer, whether it is written here as it is then.
    """

    whole: str
    spans: list[tuple[int, int] | None]
    alone: list[str]
    kept: list[bool]


class Written(NamedTuple):
    """A conversation up to some turn, and which of its answers are learned; None where that is as for the whole."""

    pieces: list[Piece]
    until: int | None = None
    learned: list[bool] = []  # noqa: RUF012

    def of(self, talk: Conversation) -> Conversation:
        """What the entry is of a conversation."""
        if self.until is None:
            return talk
        wanted = iter(self.learned)
        return replace(
            talk,
            messages=tuple(
                replace(m, trained=next(wanted)) if m.role == "assistant" else m for m in talk.messages[: self.until]
            ),
        )


class Selection(NamedTuple):
    """What is wanted of a conversation: which answers are learned, only its prompt, and several entries if need be."""

    learned: list[bool]
    prompt: bool
    split: bool


class Frame(NamedTuple):
    """A conversation with placeholders: its text, and the entries made of it."""

    whole: str
    entries: list[Written]

    def filled(self, words: list[str]) -> str:
        """The text with these words in the placeholders."""
        return PLACE.sub(lambda number: words[int(number[1])], self.whole)


def places(piece: Piece) -> list[Piece]:
    """The piece cut at its placeholders, and at borders."""
    parts = PLACE.split(piece.text)
    out: list[Piece] = []
    for i, part in enumerate(parts):
        if i % 2:
            out.append(Piece(f"{OPEN}{part}{CLOSE}", data=True, trained=piece.trained, answer=piece.answer))
            continue
        out += [Piece(text, trained=piece.trained, answer=piece.answer) for text in part.split(BORDER) if text]
    return out


def fill(piece: Piece, words: list[str]) -> Piece:
    if not piece.data:
        return piece
    number = PLACE.fullmatch(piece.text)
    assert number is not None
    return Piece(words[int(number[1])], data=True, trained=piece.trained, answer=piece.answer)
