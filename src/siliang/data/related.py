"""Rows with a text and texts that belong to it or do not, and pairs of texts with a score, as published data have them.

{anchor, positive}, {anchor, positive, negative}        texts (sentence-transformers)
{anchor, positive, negative_1, negative_2, ...}         likewise, several negatives
{query, pos: [...], neg: [...]}                         FlagEmbedding (BGE)
{query, positive_passages: [{title, text}], negative_passages: [...]}   Tevatron
{query, passages: {is_selected: [...], passage_text: [...]}}            MS MARCO
{sentence1, sentence2, score}                           STS, and labels 0 and 1
{query, response, rejected_response: [...]}             ms-swift 3; with a label in place of the last, a scored pair
{messages, positive_messages: [[...]], negative_messages: [[...]]}     ms-swift 4; likewise
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from itertools import accumulate

from siliang.config import Columns
from siliang.data.cells import BLANKS, BadRow, Result, Values, as_text, filled, given, is_blank, short
from siliang.data.examples import Related, Scored
from siliang.data.list_cells import CsvCell, as_list, held_in_text
from siliang.data.numbers import as_number, has_decimal_comma, with_point
from siliang.data.refused import refuse_media
from siliang.data.turns import turns_of
from siliang.language import Bilingual

MOST_NEGATIVE_COLUMNS = 64
BROKEN_LIST = re.compile(r"\[\s*(['\"]).*\1\s*\]|\{\s*(['\"])(is_selected|passage_text)\2.*\}", re.DOTALL)
QUOTED = re.compile(r"(['\"])(?:\\.|(?!\1).)*(?:\1|\Z)", re.DOTALL)  # to the end if it is never closed: in one pass
BESIDE_SCORES = ("rejected_response", "rejected_responses")
NEGATIVE_COLUMNS = tuple(f"negative_{i}" for i in range(1, MOST_NEGATIVE_COLUMNS + 1))


def read_related(values: Values, c: Columns) -> Result:
    """A row with an anchor and its positives, and perhaps negatives."""
    refuse_media(values)
    anchor = filled(values, c.anchor)
    value = _held(values.get(c.positive), c.positive)
    if isinstance(value, Mapping):
        positives, negatives = _selected(value, c.positive)
    else:
        positives, negatives = _texts(value, c.positive), []
    for name in (c.negative, *NEGATIVE_COLUMNS):
        if given(values.get(name)):
            negatives += _texts(values[name], name)
    if not positives:
        return Bilingual(f"has no text in {c.positive!r}", f"的 {c.positive!r} 中没有文本")
    return _related(anchor, positives, negatives)


def _related(anchor: str, positives: list[str], negatives: list[str]) -> Result:
    if both := next((text for text in positives if text in negatives), None):
        shown = short(both)
        return Bilingual(
            f"has the same text as positive and as negative: {shown}", f"的正例和负例中有相同的文本：{shown}"
        )
    return Related(anchor, tuple(dict.fromkeys(positives)), tuple(dict.fromkeys(negatives)))


def read_scored(values: Values, c: Columns) -> Result:
    """A row with two texts and a score."""
    refuse_media(values)
    first, second = filled(values, c.text), filled(values, c.text_pair)
    for name in (c.negative, *BESIDE_SCORES):
        if given(values.get(name)):
            return _negatives_and_score(name, c.score)
    return _scored(first, second, values.get(c.score), c.score)


def read_positive_messages(values: Values, c: Columns) -> Result:
    """A row with a text, and lists of such as its positives and negatives, each as messages."""
    refuse_media(values)
    anchor = _only_turn(values.get(c.messages), c.messages)
    positives = _texts_of_messages(values.get("positive_messages"), "positive_messages")
    negatives = _texts_of_messages(values.get("negative_messages"), "negative_messages")
    if not positives:
        return Bilingual("has no text in 'positive_messages'", "的 'positive_messages' 中没有文本")
    return _related(anchor, positives, negatives)


def read_scored_messages(values: Values, c: Columns) -> Result:
    """A row with a text, another one and their score, the texts as messages."""
    refuse_media(values)
    anchor = _only_turn(values.get(c.messages), c.messages)
    others = _texts_of_messages(values.get("positive_messages"), "positive_messages")
    if given(values.get("negative_messages")):
        return _negatives_and_score("negative_messages", c.label)
    if len(others) != 1:
        n = len(others)
        return Bilingual(
            f"has {n} texts in 'positive_messages' and a score in {c.label!r}: a score is of two texts",
            f"的 'positive_messages' 有 {n} 段文本，{c.label!r} 又有分数：分数只属于两段文本",
        )
    return _scored(anchor, others[0], values.get(c.label), c.label)


def _scored(first: str, second: str, value: object, column: str) -> Result:
    number = float(value) if isinstance(value, int | float | Decimal) else None  # True and False are 1 and 0
    number = as_number(with_point(value.strip())) if isinstance(value, str) else number
    if number is None and as_text(value, column).strip():
        shown = short(value)
        return Bilingual(
            f"has {shown} in {column!r}, which is no number: a score says how near two texts are. task=seq_cls learns "
            "classes of pairs; pairs that belong together need no score (columns anchor, positive)",
            f"的 {column!r} 是 {shown}，不是数：分数表示两段文本有多接近。句对的类别用 task=seq_cls 学习；"
            "相互对应的文本不需要分数（列 anchor、positive）",
        )
    if number is None or not math.isfinite(number):
        return Bilingual(f"has no number in {column!r}", f"的 {column!r} 中没有数")
    comma = value.strip() if isinstance(value, str) and has_decimal_comma(value.strip()) else ""
    return Scored(first, second, number, comma)


def _negatives_and_score(negatives: str, score: str) -> Bilingual:
    return Bilingual(
        f"has texts in {negatives!r} and a score in {score!r}: a score is of two texts, and pairs with negatives have "
        "none. Take one of them out",
        f"的 {negatives!r} 有文本，{score!r} 又有分数：分数只属于两段文本，带负例的文本对没有分数。请去掉其中之一",
    )


def _texts_of_messages(value: object, column: str) -> list[str]:
    """The texts of a list of conversations of one turn each; none of an empty cell."""
    value = as_list(value)
    if not given(value):
        return []
    if not isinstance(value, list | tuple) or not all(isinstance(turns, list | tuple) for turns in value):
        raise BadRow(
            Bilingual(
                f"must hold lists of messages in {column!r}, such as [[{{role, content}}], ...]",
                f"的 {column!r} 应为消息列表的列表，如 [[{{role, content}}], ...]",
            )
        )
    return [_only_turn(turns, column) for turns in value]


def _only_turn(turns: object, column: str) -> str:
    """The text of the only turn of a conversation.

    Raises:
        BadRow: There are others, or it is empty.
    """
    found = turns_of(turns, column)
    if len(found) > 1:
        n = len(found)
        raise BadRow(
            Bilingual(
                f"has {n} turns in {column!r}: a text that becomes a vector or is scored is one turn (what is to stand "
                "in front of each, such as a system message, is embedding.query_prompt or document_prompt)",
                f"的 {column!r} 有 {n} 轮：要转换成向量或打分的文本只能是一轮（系统消息等放在每段文本之前的内容请用 "
                "embedding.query_prompt 或 document_prompt）",
            )
        )
    if is_blank(found[0].text):
        raise BadRow(Bilingual(f"has an empty text in {column!r}", f"的 {column!r} 中有空的文本"))
    return found[0].text


def _texts(value: object, column: str) -> list[str]:
    """The texts of a cell: one, or a list of texts or of {title, text}, which csv holds as text.

    Raises:
        BadRow: One of them is empty, or no text.
    """
    value = _held(value, column)
    parts = value if isinstance(value, list | tuple) else [value]
    found = [as_text(_of_passage(part), column) for part in parts]
    if any(map(is_blank, found)):
        raise BadRow(Bilingual(f"has an empty text in {column!r}", f"的 {column!r} 中有空的文本"))
    return found


def _held(value: object, column: str) -> object:
    """The texts, passages or MS MARCO's object that a cell of csv holds as text; any other value as it is.

    Raises:
        BadRow: It looks like a list, and cannot be read as one.
    """
    if not isinstance(value, CsvCell):
        return value
    found = held_in_text(value)
    if isinstance(found, list) and all(isinstance(_of_passage(part), str) for part in found):
        return found
    if isinstance(found, dict) and "passage_text" in found:
        return found
    if found is None and _is_broken_list(value.strip(BLANKS)):
        raise BadRow(
            Bilingual(
                f"looks like a list in {column!r}, and cannot be read as one: {short(value)}",
                f"的 {column!r} 像是列表，但无法读取：{short(value)}",
            )
        )
    return value


def _is_broken_list(text: str) -> bool:
    """Whether a text that is no list was written as one: a bracket and quotes at both ends, and the first bracket is
    closed by the last one. "['a'] and ['b']" is a passage. Brackets in quotes count only where quotes are broken, too.
    """
    return BROKEN_LIST.fullmatch(text) is not None and (_is_one(QUOTED.sub("", text)) or _is_one(text))


def _is_one(text: str) -> bool:
    """Whether the first bracket of a text is closed by its last character."""
    depth = list(accumulate((c in "[{") - (c in "]}") for c in text))
    return depth[-1] == 0 and 0 not in depth[:-1]


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
