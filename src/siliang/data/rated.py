"""Rows with one answer that is marked as good or bad, as KTO learns from them.

{prompt, completion, label: true or false}       texts, or turns (TRL)
{instruction, input, output, kto_tag}            LLaMA-Factory
{messages, label}                                ms-swift; LLaMA-Factory with kto_tag
"""

from __future__ import annotations

from collections.abc import Sequence

from siliang.config import Columns
from siliang.data.cells import BadRow, Result, Values
from siliang.data.messages import Message, Ranked, Rated
from siliang.data.preferences import answer_of, checked, prompt_of
from siliang.data.refused import refuse_media
from siliang.data.turns import tools_of, turns_of
from siliang.language import Bilingual

MARKS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def read_rated_answer(values: Values, c: Columns) -> Result:
    """A row whose answer is a column of its own."""
    refuse_media(values)
    return _rated(values, c, prompt_of(values, c), answer_of(values.get(c.completion), c.completion), c.completion)


def read_rated_messages(values: Values, c: Columns) -> Result:
    """A row whose conversation ends with the answer."""
    refuse_media(values)
    turns = turns_of(values.get(c.messages), c.messages)
    if turns[-1].role != "assistant":
        return Bilingual(f"has no answer at the end of {c.messages!r}", f"的 {c.messages!r} 末尾没有回答")
    return _rated(values, c, turns[:-1], turns[-1:], c.messages)


def _rated(values: Values, c: Columns, prompt: Sequence[Message], answer: Sequence[Message], column: str) -> Result:
    desirable = _mark(values.get(c.label), c.label)
    ranked = checked(Ranked(tuple(prompt), (tuple(answer),), tools_of(values, c)), values, c, [column])
    if not isinstance(ranked, Ranked):
        return ranked
    return Rated(ranked.prompt_messages, ranked.answers[0], desirable, ranked.tools)


def _mark(value: object, column: str) -> bool:
    found = MARKS.get(str(value).strip().lower()) if isinstance(value, bool | int | float | str) else None
    if isinstance(value, float) and value in (0.0, 1.0):
        found = value == 1.0
    if found is None:
        raise BadRow(
            Bilingual(
                f"has {value!r} in {column!r}, which is neither true nor false (1 or 0)",
                f"的 {column!r} 是 {value!r}，不是 true 或 false（1 或 0）",
            )
        )
    return found
