"""Texts, or pairs of texts, to tokens as the tokenizer itself makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from siliang.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class CodedText:
    """The tokens of a text or a pair.

    Attributes:
        ids: At most the given number.
        types: The part of a pair that each belongs to; None where the tokenizer does not say, or of a single text.
        lost: How many tokens were cut off.
    """

    ids: list[int]
    types: list[int] | None
    lost: int


def coded_texts(tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str | None], limit: int) -> list[CodedText]:
    """The tokens of each text, or of each pair, with the tokenizer's special tokens around them.

    Args:
        pairs: The second texts; either all are None or none is.
        limit: A text that is longer is cut, of a pair the longer part; the special tokens at its end stay.
    """
    second = [pair for pair in pairs if pair is not None]
    assert len(second) in (0, len(texts)), "pairs and single texts in one data set; reading refuses them"
    whole = tokenizer(list(texts), second or None, verbose=False)
    found: list[CodedText] = []
    for i, (text, pair) in enumerate(zip(texts, pairs, strict=True)):
        ids = whole["input_ids"][i]
        types = whole["token_type_ids"][i] if second and "token_type_ids" in whole else None
        lost = max(0, len(ids) - limit)
        if lost:
            cut = tokenizer(text, pair, truncation=True, max_length=limit)
            ids, types = cut["input_ids"], cut["token_type_ids"] if types is not None else None
        found.append(CodedText(ids, types, lost))
    return found
