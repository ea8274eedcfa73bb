"""Rules on the turns of conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache

from siliang.check.finding import Problem
from siliang.check.input import CheckInput
from siliang.data.example import Example
from siliang.data.examples import Labelled, Related, Scored, SeveralLabels, SourceTarget, Span, Tagged
from siliang.data.messages import Call, Conversation, Message, Ranked, Rated
from siliang.language import Bilingual
from siliang.secrets import shortened

WITH_TURNS = Conversation | Ranked | Rated  # kinds of rows
WITHOUT_TURNS = Labelled | SeveralLabels | Tagged | Span | SourceTarget | Related | Scored  # kinds that are never mixed


def turns_that_do_not_fit(s: CheckInput) -> Iterator[Problem]:
    """Turns of a conversation that do not fit each other.

    Cause: What a model learns from such a conversation cannot work where it is used: a result that answers no call, a
    call of a function that is not among the tools, or with arguments that are not a JSON object. Of several system
    messages many templates write the first alone, or each behind what came before it.

    Fix: Correct the ids of calls and results, the names and the arguments; join the system messages into one.

    对话的各轮不相符

    原因：从这样的对话学到的内容在使用时行不通：工具结果没有对应的调用，调用了工具列表中没有的函数，或调用的参数不是
    JSON 对象。有多条系统消息时，许多模板只写第一条，或写在中途。

    办法：改正调用与结果的 id、函数名和参数；把多条系统消息合并成一条。
    """
    train = s.examples.train
    if not len(train) or isinstance(train[0], WITHOUT_TURNS):
        return
    found: dict[str, tuple[list[int], Bilingual]] = {}
    for i, example in enumerate(train):
        for kind, what in _misfits(example).items():
            found.setdefault(kind, ([], what))[0].append(i)
    for rows, what in found.values():
        n = len(rows)
        message = Bilingual(f"{n:,} training rows have {what}", f"{n:,} 条训练样本有{what.zh}")
        yield Problem(message, s.places(rows), n)


def _misfits(example: Example) -> dict[str, Bilingual]:
    """What does not fit in a conversation: by its kind, the first of it in words."""
    if not isinstance(example, WITH_TURNS):
        return {}
    talks = [example] if isinstance(example, Conversation) else _talks(example)
    found: dict[str, Bilingual] = {}
    for talk in talks:
        if sum(m.role == "system" for m in talk.messages) > 1:
            found.setdefault("system", Bilingual("more than one system message", "不止一条系统消息"))
        names = _names(talk.tools)
        open_calls: list[Call] = []
        for message in talk.messages:
            for call in message.calls:
                found = _of_call(call, names) | found
            open_calls += message.calls
            if message.role == "tool" and (what := _of_result(message, open_calls)) is not None:
                found.setdefault("result", what)
    return found


def _talks(example: Ranked | Rated) -> list[Conversation]:
    return example.conversations if isinstance(example, Ranked) else example.ranked.conversations


def _of_call(call: Call, names: set[str] | None) -> dict[str, Bilingual]:
    found: dict[str, Bilingual] = {}
    name = shortened(call.name, 40)
    if names is not None and call.name not in names:
        there, there_zh = ", ".join(sorted(names)[:5]) or "none", "、".join(sorted(names)[:5]) or "没有"
        found["name"] = Bilingual(
            f"a call of {name!r}, which is not among the tools ({there})",
            f"对 {name!r} 的调用，而工具列表中没有它（{there_zh}）",
        )
    try:
        arguments: object = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        shown = shortened(call.arguments, 40)
        found["arguments"] = Bilingual(
            f"a call of {name!r} whose arguments are not a JSON object: {shown!r}",
            f"对 {name!r} 的调用，其参数不是 JSON 对象：{shown!r}",
        )
    return found


def _of_result(message: Message, calls: list[Call]) -> Bilingual | None:
    """What is wrong with a tool's result behind these calls."""
    if not calls:
        return Bilingual("a result of a tool without a call before it", "之前没有对应调用的工具结果")
    ids = {call.id for call in calls} - {""}
    if message.call_id and ids and message.call_id not in ids:
        there, there_zh = ", ".join(sorted(ids)[:5]), "、".join(sorted(ids)[:5])
        return Bilingual(
            f"a result for the call {message.call_id!r}, which is not there (the calls before it: {there})",
            f"针对调用 {message.call_id!r} 的结果，而没有这个调用（之前的调用：{there_zh}）",
        )
    if message.name and message.name not in {call.name for call in calls}:
        return Bilingual(
            f"a result of {message.name!r}, which was not called", f"工具 {message.name!r} 的结果，而它没有被调用"
        )
    return None


@lru_cache(maxsize=1024)
def _names(tools: str) -> set[str] | None:
    """The names of the functions that may be called; None where the tools are not known, or written in another way."""
    try:
        listed = json.loads(tools) if tools else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(listed, list):
        return None
    functions = [t.get("function", t) if isinstance(t, Mapping) else None for t in listed]
    names = [f.get("name") if isinstance(f, Mapping) else None for f in functions]
    return {name for name in names if isinstance(name, str)} if all(isinstance(n, str) for n in names) else None
