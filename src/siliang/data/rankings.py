"""Rows with several answers to one prompt, in an order or with scores.

{prompt, responses: [text], scores: [number]}                       the higher the better
{prompt, answers: [{answer, rank}]}                                 Nectar; rank 1 is the best
{instruction, completions: [{response, overall_score}]}             UltraFeedback
{question, answers: [{text, pm_score}]}                             Stack Exchange's
{instruction, output: [text]}                                       LLaMA-Factory's older ones, the best first
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from siliang.config import Columns
from siliang.data.cells import BadRow, Result, Values, given
from siliang.data.list_cells import as_list
from siliang.data.messages import Ranked
from siliang.data.numbers import as_number
from siliang.data.preferences import answer_of, checked, prompt_of
from siliang.data.refused import refuse_media
from siliang.data.turns import tools_of
from siliang.language import Bilingual

TEXTS = ("response", "answer", "text", "content", "value", "completion", "output")  # of an answer that is an object
SCORES = ("score", "overall_score", "pm_score", "rating")
RANKS = ("rank", "ranking")
TOO_MANY = 32  # answers of a row, which are some 500 pairs


def read_ranking(values: Values, c: Columns) -> Result:
    """A row whose answers are a list in the column `responses`."""
    refuse_media(values)
    answers = _listed(values, c.responses)
    scores = as_list(values.get(c.scores)) if given(values.get(c.scores)) else None
    if scores is None and all(isinstance(answer, dict) and "role" not in answer for answer in answers):
        return _of_objects(values, c, answers)
    if scores is None:
        return Bilingual(
            f"has answers in {c.responses!r} and no {c.scores!r}, which say which are better (the higher, the better)",
            f"的 {c.responses!r} 中有多个回答，却没有 {c.scores!r} 说明哪个更好（越大越好）",
        )
    if not isinstance(scores, list | tuple) or len(scores) != len(answers):
        return Bilingual(
            f"must hold as many numbers in {c.scores!r} as answers in {c.responses!r}, {len(answers)}",
            f"的 {c.scores!r} 应有 {len(answers)} 个数，与 {c.responses!r} 中的回答一样多",
        )
    return _ranking(values, c, answers, [_number(score, c.scores) for score in scores], c.responses)


def read_output_list(values: Values, c: Columns) -> Result:
    """A row whose output is a list of answers, the best first."""
    refuse_media(values)
    if isinstance(as_list(values.get(c.output)), str):
        return Bilingual(
            f"has one answer in {c.output!r}, not a list, the best first; task=causal_lm learns single answers",
            f"的 {c.output!r} 只有一个回答，应为从好到坏的列表；单个回答请用 task=causal_lm 学习",
        )
    answers = _listed(values, c.output)
    return _ranking(values, c, answers, [-float(i) for i in range(len(answers))], c.output)


def _listed(values: Values, column: str) -> Sequence[object]:
    answers = as_list(values.get(column))
    if not isinstance(answers, list | tuple) or len(answers) < 2:
        raise BadRow(
            Bilingual(f"has no list of two answers or more in {column!r}", f"的 {column!r} 不是两个以上回答的列表")
        )
    if len(answers) > TOO_MANY:
        raise BadRow(
            Bilingual(
                f"has {len(answers)} answers in {column!r}: at most {TOO_MANY} are compared with each other",
                f"的 {column!r} 有 {len(answers)} 个回答：最多比较 {TOO_MANY} 个",
            )
        )
    return answers


def _of_objects(values: Values, c: Columns, answers: Sequence[object]) -> Result:
    """Answers that each have their score or their rank."""
    objects = [answer for answer in answers if isinstance(answer, dict)]
    for names, sign in ((SCORES, 1.0), (RANKS, -1.0)):
        name = next((n for n in names if all(given(one.get(n)) for one in objects)), None)
        if name is not None:
            texts = [next((one[key] for key in TEXTS if given(one.get(key))), None) for one in objects]
            return _ranking(values, c, texts, [sign * _number(one[name], name) for one in objects], c.responses)
    return Bilingual(
        f"has answers in {c.responses!r} of which not each has a score or a rank ({', '.join((*SCORES, *RANKS))})",
        f"的 {c.responses!r} 中并非每个回答都有分数或名次（{'、'.join((*SCORES, *RANKS))}）",
    )


def _number(value: object, column: str) -> float:
    number = as_number(value.strip()) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise BadRow(Bilingual(f"has {value!r} in {column!r}, not a number", f"的 {column!r} 中有 {value!r}，不是数"))
    return float(number)


def _ranking(values: Values, c: Columns, answers: Sequence[object], scores: Sequence[float], column: str) -> Result:
    """The example of answers with scores, the best first; those with the same score are not compared."""
    if len(set(scores)) < 2:
        return Bilingual(
            f"has the same score for all answers in {column!r}: none is better",
            f"的 {column!r} 中所有回答分数相同，分不出好坏",
        )
    order = sorted(range(len(answers)), key=lambda i: -scores[i])
    places = sorted(set(scores), reverse=True)
    ranked = Ranked(
        tuple(prompt_of(values, c)),
        tuple(tuple(answer_of(answers[i], column)) for i in order),
        tools_of(values, c),
        tuple(places.index(scores[i]) for i in order),
    )
    return checked(ranked, values, c, [column] * len(answers))
