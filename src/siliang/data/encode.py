"""Pieces of text to tokens, so that the tokens are those of the whole text and the borders are exact.

Tokenizers differ at the border of two texts that are tokenized separately: those of Llama and ChatGLM3 add a space
before each, most do nothing. `Encoder` tries the given tokenizer, and corrects the difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from siliang.data.example import IGNORED
from siliang.data.templates import Piece
from siliang.language import Bilingual
from siliang.models.tokenizer import Tokenizer
from siliang.types import ConfigError


class Encoder:
    """A tokenizer, and what is known of it.

    Attributes:
        start: The tokens that it puts in front of every text: Llama's <s>, ChatGLM3's [gMASK] sop; for BLOOM none.
        eos: The token that ends an answer: its end of sequence, or, as GPT2-Chinese does with BERT's vocabulary, [SEP].
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.start = _start(tokenizer)
        self.eos = tokenizer.eos_token_id
        if self.eos is None:
            self.eos = getattr(tokenizer, "sep_token_id", None)
        self._size = len(tokenizer)
        self._markers = _markers(tokenizer)
        self._reserved = _reserved(tokenizer)
        names = sorted(self._markers, key=len, reverse=True)
        # a word such as ChatGLM3's `sop` is a marker only at the very places where a template means it
        self._split = re.compile("(" + "|".join(map(re.escape, ["{start}", "{bos}", "{eos}", *names])) + ")")
        first = self.text(["a"])[0]
        tokens = tokenizer.convert_ids_to_tokens(first)
        self._adds_space = bool(tokens) and str(tokens[0])[:1] in ("▁", "Ġ")
        self._space_after_marker = self._adds_space and self._puts_space_after_marker()

    def need_eos(self) -> int:
        """The token that ends an answer.

        Raises:
            ConfigError: The tokenizer has none.
        """
        if self.eos is None:
            raise ConfigError(
                Bilingual(
                    "the tokenizer has no end-of-sequence token, so a model could not learn to stop: add one with "
                    "data.add_tokens and name it in tokenizer_config.json (eos_token).",
                    "分词器没有结束符，模型学不会停止：请用 data.add_tokens 添加一个，"
                    "并在 tokenizer_config.json 中指明（eos_token）。",
                )
            )
        return self.eos

    def marker(self, text: str) -> int | None:
        """The number of the single token that `text` is, if it is one."""
        return self._markers.get(text)

    def markers_in(self, text: str) -> list[str]:
        """The markers that occur in a text: what is one token by itself, special tokens and added ones."""
        return [m for m in self._split.findall(text) if m in self._markers]

    def reserved(self) -> list[str]:
        """The markers that no text of the data may be: special tokens. Others, such as Qwen's <think>, are words that
        the tokenizer knows whole, in any text."""
        return [m for m in self._markers if m in self._reserved]

    def reserved_in(self, text: str) -> list[str]:
        """The special tokens that occur in a text."""
        return [m for m in self.markers_in(text) if m in self._reserved]

    @property
    def joins_space(self) -> bool:
        """A space in front of a text is part of the text's first token."""
        return self._adds_space

    def text(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, nothing added, nothing in it taken for a special token."""
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]

    def rows(self, rows: Iterable[Sequence[Piece]], *, own_spacing: bool = False) -> list[tuple[list[int], list[int]]]:
        """(tokens, labels) of each row of pieces; all texts go through the tokenizer at once.

        Args:
            own_spacing: After <s> do as the tokenizer does with a whole text, instead of beginning anew.
        """
        parsed = [self._runs(row, own_spacing) for row in rows]
        wanted = list(dict.fromkeys(part for runs in parsed for run in runs for part in run.parts))
        known = dict(zip(wanted, self.text(wanted), strict=True))
        return [self._join(runs, known) for runs in parsed]

    def learned_bytes(self, pieces: Iterable[Piece]) -> int:
        """The UTF-8 bytes of the text that is learned of a row of pieces, without markers."""
        texts = (
            part
            for piece in pieces
            if piece.trained and not piece.end
            for part in ([piece.text] if piece.data else self._split.split(piece.text))
            if piece.data or self._special(part) is None
        )
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)

    def decoded_bytes(self, ids: Sequence[int]) -> int:
        """The UTF-8 bytes of the text of these tokens, without special ones."""
        known = [i for i in ids if i < self._size]
        text = self.tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.encode("utf-8", "surrogatepass"))

    def prompt(self, pieces: Sequence[Piece], *, own_spacing: bool = False) -> list[int]:
        """The tokens in front of an answer, which will begin as it began in training."""
        # an answer that is there for the border's sake and cut off again
        runs = self._runs([*pieces, Piece("a", data=True, trained=True, answer=True)], own_spacing)[:-1]
        return self._join(
            runs, {p: ids for run in runs for p, ids in zip(run.parts, self.text(run.parts), strict=True)}
        )[0]

    def _join(self, runs: list[_Run], known: dict[str, list[int]]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for run in runs:
            fresh = run.ids if run.ids is not None else run.cut(known)
            ids += fresh
            labels += fresh if run.trained else [IGNORED] * len(fresh)
        return ids, labels

    def _runs(self, pieces: Sequence[Piece], own_spacing: bool) -> list[_Run]:
        """Markers as tokens; the text between two of them, or between learned and not, in one."""
        runs: list[_Run] = []
        for piece in pieces:
            if piece.end:
                number = self.marker(piece.text)
                runs.append(_Run("", piece.trained, ids=[self.need_eos() if number is None else number]))
                continue
            for part in [piece.text] if piece.data else self._split.split(piece.text):
                tokens = None if piece.data else self._special(part)
                last = runs[-1] if runs else None
                if tokens is not None:
                    runs.append(_Run("", piece.trained, ids=tokens))
                elif part and last and last.ids is None and last.joins(piece):
                    last.text += part
                elif part:
                    runs.append(_Run(part, piece.trained, answer=piece.answer, alone=piece.alone))
        for before, run in zip([None, *runs], runs, strict=False):
            if run.ids is None and before is not None and not run.alone:
                self._at_border(before, run, own_spacing)
        return [run for run in runs if run.ids is not None or run.text]

    def _at_border(self, before: _Run, run: _Run, own_spacing: bool) -> None:
        """Decides how a text that follows another, or a marker, is to be tokenized."""
        if not self._adds_space:
            return
        if before.ids is not None:
            # at the beginning of a text the tokenizer's own space belongs there; the models' own code begins a new text
            # after each <s>, while a tokenizer that is given the whole does not
            bos = self.tokenizer.bos_token_id
            fresh = not before.ids or (not own_spacing and before.ids in (self.start, self.start[-1:], [bos]))
            if not fresh and not self._space_after_marker:
                run.guard = "\n"
        elif before.text.endswith(" "):
            before.text = before.text[:-1]  # the tokenizer writes it, in the first token of what follows
        elif not run.text.startswith(" "):
            run.guard = "\n"

    def _special(self, part: str) -> list[int] | None:
        match part:
            case "{start}":
                return self.start
            case "{eos}":
                return [self.need_eos()]
            case "{bos}":
                bos = self.tokenizer.bos_token_id
                return [] if bos is None else [bos]
        number = self._markers.get(part)
        return None if number is None else [number]

    def _puts_space_after_marker(self) -> bool:
        marker = next(iter(self._markers), None)
        if marker is None:
            return True
        coded = self.tokenizer(marker + "a", add_special_tokens=False, split_special_tokens=False, verbose=False)
        tokens = self.tokenizer.convert_ids_to_tokens(coded["input_ids"])
        return len(tokens) > 1 and str(tokens[1])[:1] in ("▁", "Ġ")


class _Run:
    """Text, or tokens, that are learned or not."""

    def __init__(
        self, text: str, trained: bool, *, ids: list[int] | None = None, answer: bool = False, alone: bool = False
    ) -> None:
        self.text, self.trained, self.ids, self.answer, self.alone = text, trained, ids, answer, alone
        self.guard = ""  # text put in front for the tokenizer's sake, whose tokens are cut off again

    def joins(self, piece: Piece) -> bool:
        """Whether the text continues in `piece`."""
        return (self.trained, self.answer) == (piece.trained, piece.answer) and not piece.alone

    @property
    def parts(self) -> list[str]:
        """What must be tokenized to know this run's tokens."""
        if self.ids is not None:
            return []
        return [self.guard + self.text, self.guard, self.text] if self.guard else [self.text]

    def cut(self, known: dict[str, list[int]]) -> list[int]:
        if self.guard:
            whole, guard = known[self.guard + self.text], known[self.guard]
            if whole[: len(guard)] == guard:
                return whole[len(guard) :]
        return known[self.text]


def _start(tokenizer: Tokenizer) -> list[int]:
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer("a", verbose=False)["input_ids"]
    for at in range(len(whole) - len(plain) + 1):
        if plain and whole[at : at + len(plain)] == plain:
            return whole[:at]
    return []


def _markers(tokenizer: Tokenizer) -> dict[str, int]:
    """Every token that the tokenizer knows whole: special tokens and added ones."""
    found: dict[str, int | None] = {**tokenizer.get_added_vocab()}
    for text in tokenizer.all_special_tokens:
        found.setdefault(text, tokenizer.convert_tokens_to_ids(text))
    # blank ones (Gemma's line breaks, GPT-NeoX's runs of spaces) are text
    return {text: number for text, number in found.items() if text.strip() and isinstance(number, int) and number >= 0}


def _reserved(tokenizer: Tokenizer) -> set[str]:
    """The tokens that act on the conversation: those marked special, also where only the vocabulary says so."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
