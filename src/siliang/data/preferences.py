"""Rows with a better and a worse answer, as published data and other programs write them.

{prompt, chosen, rejected}                      texts, or turns (TRL, UltraFeedback)
{chosen, rejected}                              whole conversations, of which the common beginning is the prompt;
                                                or texts with "Human:" and "Assistant:" (HH-RLHF)
{instruction, input, chosen, rejected}          LLaMA-Factory's alpaca
{conversations, chosen: {from, value}, rejected: {from, value}}     LLaMA-Factory's sharegpt
{messages, rejected_response}                   ms-swift: the last answer of `messages` is the better one
{messages, rejected_messages}                   ms-swift: two whole conversations
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from siliang.config import Columns
from siliang.data.cells import BadRow, Result, Values, as_text, cell, given, is_blank
from siliang.data.messages import Message, Ranked
from siliang.data.refused import refuse_media
from siliang.data.turns import history_of, text_or_turns, tools_of, turns_of
from siliang.language import Bilingual
from siliang.secrets import shortened

SPEAKERS = re.compile(r"(?:^|\n)\s*(Human|Assistant): ?")  # of HH-RLHF, at the beginning of a line


def read_chosen_rejected(values: Values, c: Columns) -> Result:
    """A row with the columns chosen and rejected."""
    refuse_media(values)
    if given(values.get("margin")):
        return Bilingual(
            "has 'margin', by which some programs shift the loss of rewards, and siliang does not: remove the column",
            "有 'margin'：有的程序用它平移奖励的损失，而 siliang 不用：请去掉这一列",
        )
    answers = [answer_of(values.get(name), name) for name in (c.chosen, c.rejected)]
    prompt = prompt_of(values, c)
    return _ranked(values, c, prompt, *answers)


def read_messages_rejected(column: str) -> Callable[[Values, Columns], Result]:
    """Reads a row whose conversation ends with the better answer, with the worse one in this column of its own."""
    return partial(_messages_rejected, column)


def _messages_rejected(column: str, values: Values, c: Columns) -> Result:
    refuse_media(values)
    turns = turns_of(values.get(c.messages), c.messages)
    rejected = answer_of(values.get(column), column)
    if not turns or turns[-1].role != "assistant":
        return Bilingual(
            f"has no answer at the end of {c.messages!r}, which is to be the better one",
            f"的 {c.messages!r} 末尾没有回答，那里应是较好的回答",
        )
    whole = rejected[0].role != "assistant"
    return _ranked(values, c, [] if whole else turns[:-1], turns if whole else turns[-1:], rejected)


def answer_of(value: object, column: str) -> list[Message]:
    """The turns of an answer, or of a conversation that ends with it."""
    value = text_or_turns(value, column)
    if isinstance(value, dict):  # one turn
        value = [value]
    if isinstance(value, list | tuple):
        return turns_of(value, column)
    text = as_text(value)
    if is_blank(text):
        raise BadRow(Bilingual(f"has an empty {column!r}", f"的 {column!r} 为空"))
    return _of_speakers(text) or [Message("assistant", text)]


def _of_speakers(text: str) -> list[Message]:
    """The turns of a text as HH-RLHF writes a conversation; none where it is not one."""
    if not text.lstrip().startswith("Human:"):
        return []
    _, *parts = SPEAKERS.split(text)
    roles = zip(parts[::2], parts[1::2], strict=True)
    return [Message("user" if name == "Human" else "assistant", words.strip()) for name, words in roles]


def prompt_of(values: Values, c: Columns) -> list[Message]:
    """The turns in front of both answers, as far as columns of their own hold them."""
    prompt: list[Message] = []
    column = next((n for n in (c.prompt, c.instruction, c.messages, "conversations") if given(values.get(n))), None)
    about, history = cell(values, c.input), history_of(values)
    if column is not None and isinstance(turns := text_or_turns(values.get(column), column), list | tuple):
        prompt = turns_of(turns, column)
        if not is_blank(about) or history:
            raise BadRow(
                Bilingual(
                    f"has turns in {column!r} and also {c.input!r} or 'history': write them into the turns",
                    f"的 {column!r} 是多轮对话，又有 {c.input!r} 或 'history'：请写进对话中",
                )
            )
    elif column is not None and not is_blank(text := cell(values, column)):
        before = [m for q, a in history for m in (Message("user", q), Message("assistant", a))]
        prompt = [*before, Message("user", text, about)]
    return prompt


def _ranked(
    values: Values, c: Columns, prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> Result:
    """The example of two answers, each alone or as a whole conversation."""
    for name, turns in ((c.chosen, chosen), (c.rejected, rejected)):
        if turns[-1].role != "assistant":
            return Bilingual(f"has no answer at the end of {name!r}", f"的 {name!r} 末尾没有回答")
    whole = chosen[0].role != "assistant", rejected[0].role != "assistant"
    if whole[0] != whole[1]:
        return Bilingual(
            f"has a whole conversation in one of {c.chosen!r} and {c.rejected!r}, and an answer alone in the other",
            f"的 {c.chosen!r} 和 {c.rejected!r} 一个是整段对话，另一个只是回答",
        )
    if whole[0]:
        common = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), len(rejected))
        common = min(common, len(chosen) - 1, len(rejected) - 1)
        if not any(m.role == "user" for m in chosen[:common]):
            return Bilingual(
                f"asks one thing in {c.chosen!r} and another in {c.rejected!r}: {_short(chosen[:-1])} and "
                f"{_short(rejected[:-1])}",
                f"的 {c.chosen!r} 与 {c.rejected!r} 提问不同：{_short(chosen[:-1])} 与 {_short(rejected[:-1])}",
            )
        before = chosen[:common]
        system_turns = [m for m in prompt if m.role == "system" and m not in before]
        if prompt and before and not _same(prompt, before) and prompt != chosen:
            return Bilingual(
                f"asks one thing in its own column and another in {c.chosen!r}: {_short(prompt)} and {_short(before)}",
                f"自己一列的提问与 {c.chosen!r} 中的不同：{_short(prompt)} 与 {_short(before)}",
            )
        prompt, chosen, rejected = [*system_turns, *before], chosen[common:], rejected[common:]
    ranked = Ranked(tuple(prompt), (tuple(chosen), tuple(rejected)), tools_of(values, c))
    return checked(ranked, values, c, (c.chosen, c.rejected))


def _same(prompt: list[Message], before: list[Message]) -> bool:
    """Whether a column of its own asks what the conversations ask: all their turns, or the last question of them."""
    alone = [m for m in before if m.role != "system"]
    texts = [m.text.strip() for m in prompt if m.role != "system"]
    return texts in ([m.text.strip() for m in part] for part in (alone, alone[-1:], alone[:1]))


def checked(ranked: Ranked, values: Values, c: Columns, columns: Sequence[str]) -> Result:
    """The example with the row's system message, or why no answer of it can be learned.

    Args:
        columns: Where each answer is from.
    """
    prompt = list(ranked.prompt_messages)
    if system := cell(values, c.system).strip():
        prompt = [Message("system", system), *prompt]
    if len({m.content for m in prompt if m.role == "system"}) > 1:
        return Bilingual("has two different system messages", "有两条不同的系统消息")
    talk = [m for m in prompt if m.role != "system"]
    prompt = [*dict.fromkeys(m for m in prompt if m.role == "system"), *talk]
    where, where_zh = (" and ".join(map(repr, dict.fromkeys(columns))), " 和 ".join(map(repr, dict.fromkeys(columns))))
    if not talk:
        way, way_zh = (
            (f", or put it into both {where}", f"，或把它写进 {where_zh}") if len(set(columns)) > 1 else ("", "")
        )
        return Bilingual(
            f"has no question: name its column with data.columns.prompt{way}",
            f"没有提问：请用 data.columns.prompt 指定它的列{way_zh}",
        )
    if talk[0].role != "user" or talk[-1].role == "assistant":
        end, role = ("begins", talk[0].role) if talk[0].role != "user" else ("ends", "assistant")
        return Bilingual(
            f"{end} its question with the {role}: it must begin with the user, and an answer must follow it",
            f"的提问以 {role} {'开头' if end == 'begins' else '结尾'}：应以 user 开头，并由回答接在后面",
        )
    for name, answer in zip(columns, ranked.answers, strict=True):
        if answer[0].role != "assistant":
            return Bilingual(
                f"has whole conversations in {name!r}, where answers alone belong",
                f"的 {name!r} 应只有回答，而不是整段对话",
            )
        if any(m.role == "assistant" and is_blank(m.content) and not m.calls for m in answer):
            return Bilingual(f"has an empty answer in {name!r}", f"的 {name!r} 中有空的回答")
    if len(ranked.answers) > 1 and not ranked.pairs:
        return Bilingual(f"has the same text in {where}: neither is better", f"的 {where_zh} 文本相同，分不出好坏")
    answers = tuple(tuple(replace(m, trained=True) for m in a) for a in ranked.answers)
    return replace(ranked, prompt_messages=tuple(prompt), answers=answers)


def _short(turns: list[Message]) -> str:
    return repr(shortened(turns[-1].text if turns else "", 40))
