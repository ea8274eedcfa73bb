"""Rows with a text and texts that belong to it or do not, and pairs of texts with a score, as published data have them.

{anchor, positive}, {anchor, positive, negative}        texts (sentence-transformers)
{anchor, positive, negative_1, negative_2, ...}         likewise, several negatives
{query, pos: [...], neg: [...]}                         FlagEmbedding (BGE)
{query, positive_passages: [{title, text}], negative_passages: [...]}   Tevatron
{query, passages: {is_selected: [...], passage_text: [...]}}            MS MARCO
{sentence1, sentence2, score}                           STS, and labels 0 and 1
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal

from siliang.config import Columns
from siliang.data.cells import BLANKS, BadRow, Result, Values, as_text, filled, given, short
from siliang.data.examples import Related, Scored
from siliang.data.numbers import as_number, with_point
from siliang.data.refused import refuse_media
from siliang.language import Bilingual

MOST_NEGATIVE_COLUMNS = 64
NEGATIVE_COLUMNS = tuple(f"negative_{i}" for i in range(1, MOST_NEGATIVE_COLUMNS + 1))


def read_related(values: Values, c: Columns) -> Result:
    """A row with an anchor and its positives, and perhaps negatives."""
    refuse_media(values)
    anchor = filled(values, c.anchor)
    value = values.get(c.positive)
    if isinstance(value, Mapping):
        positives, negatives = _selected(value, c.positive)
    else:
        positives, negatives = _texts(value, c.positive), []
    for name in (c.negative, *NEGATIVE_COLUMNS):
        if given(values.get(name)):
            negatives += _texts(values[name], name)
    if not positives:
        return Bilingual(f"has no text in {c.positive!r}", f"的 {c.positive!r} 中没有文本")
    if both := next((text for text in positives if text in negatives), None):
        shown = short(both)
        return Bilingual(
            f"has the same text as positive and as negative: {shown}", f"的正例和负例中有相同的文本：{shown}"
        )
    return Related(anchor, tuple(dict.fromkeys(positives)), tuple(dict.fromkeys(negatives)))


def read_scored(values: Values, c: Columns) -> Result:
    """A row with two texts and a score."""
    refuse_media(values)
    first, second, value = filled(values, c.text), filled(values, c.text_pair), values.get(c.score)
    number = float(value) if isinstance(value, int | float | Decimal) else None  # True and False are 1 and 0
    number = as_number(with_point(value.strip())) if isinstance(value, str) else number
    if number is None and as_text(value, c.score).strip():
        shown = short(value)
        return Bilingual(
            f"has {shown} in {c.score!r}, which is no number: a score says how near two texts are. task=seq_cls learns "
            "classes of pairs; pairs that belong together need no score (columns anchor, positive)",
            f"的 {c.score!r} 是 {shown}，不是数：分数表示两段文本有多接近。句对的类别用 task=seq_cls 学习；"
            "相互对应的文本不需要分数（列 anchor、positive）",
        )
    if number is None or not math.isfinite(number):
        return Bilingual(f"has no number in {c.score!r}", f"的 {c.score!r} 中没有数")
    return Scored(first, second, number)


def _texts(value: object, column: str) -> list[str]:
    """The texts of a cell: one, or a list of texts or of {title, text}.

    Raises:
        BadRow: One of them is empty, or no text.
    """
    parts = value if isinstance(value, list | tuple) else [value]
    found = [as_text(_of_passage(part), column) for part in parts]
    if not all(text.strip(BLANKS) for text in found):
        raise BadRow(Bilingual(f"has an empty text in {column!r}", f"的 {column!r} 中有空的文本"))
    return found


def _of_passage(part: object) -> object:
    """The text of {title, text} with its title in front; anything else unchanged."""
    if not isinstance(part, Mapping) or "text" not in part:
        return part
    title = part.get("title")
    return f"{title} {part['text']}" if isinstance(title, str) and title.strip() else part["text"]


def _selected(value: Mapping[object, object], column: str) -> tuple[list[str], list[str]]:
    """The texts of MS MARCO's passages: those that are selected, and the others."""
    texts, marks = value.get("passage_text"), value.get("is_selected")
    if not isinstance(texts, list | tuple) or not isinstance(marks, list | tuple) or len(texts) != len(marks):
        raise BadRow(
            Bilingual(
                f"must hold a text, a list of texts, or is_selected and passage_text in {column!r}",
                f"的 {column!r} 应为文本、文本的列表，或 is_selected 和 passage_text",
            )
        )
    pairs = list(zip(_texts(texts, column), marks, strict=True))
    return [text for text, mark in pairs if mark], [text for text, mark in pairs if not mark]
