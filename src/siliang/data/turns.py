"""Conversations: the turns of a row, or an instruction and its answer in separate columns."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from siliang.config import Columns
from siliang.data.cells import BadRow, Result, Values, as_json, as_text, cell, given, is_blank, short
from siliang.data.list_cells import CsvCell, as_list
from siliang.data.messages import Call, Conversation, Message, Role
from siliang.data.refused import MEDIA, media_in, refuse_other_lessons, text_only
from siliang.language import Bilingual, local
from siliang.safety.safe_json import JsonError, parse_json
from siliang.secrets import shortened

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
CALLING = ("function_call", "tool_call")  # roles whose content is a tool call

# Fields of a turn that say whether it is learned: OpenAI's weight, axolotl's train and training, ms-swift's loss
MARKS = ("weight", "train", "training", "loss", "loss_mask")
DETAILS = ("train_detail", "training_detail")  # parts of a turn, by characters
REASONING = ("reasoning_content", "thinking", "reasoning")
USED = frozenset(
    ("role", "from", "content", "value", "tool_calls", "function_call", *MARKS, *DETAILS, "mask", *REASONING, *MEDIA)
)
LIKE_TURNS = re.compile(r"\s*\[\s*\{\s*(['\"])(role|from|content|value)\1\s*:")
USED_OF = {"tool": ("name", "tool_call_id"), "system": ("tools",)}  # fields that only turns of this role may have


def unused_fields(values: Values, c: Columns) -> set[str]:
    """The fields of a row's turns that siliang does not use, as "messages[].name"."""
    found: set[str] = set()
    for column in (c.messages, "conversations", c.prompt, c.completion):
        turns = as_list(values.get(column))
        for turn in turns if isinstance(turns, list | tuple) else ():
            if isinstance(turn, dict):
                role = ROLES.get(str(_first(turn, "role", "from")).lower(), "user")
                used = USED.union(USED_OF.get(role, ()))
                found.update(f"{column}[].{name}" for name, value in turn.items() if name not in used and given(value))
    return found


def _first(turn: Values, *names: str) -> object:
    """The first of these fields that is there and not null."""
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def read_messages(values: Values, c: Columns, column: str) -> Result:
    refuse_other_lessons(values, c, (column,))
    messages: list[Message] = []
    if system := cell(values, c.system).strip():
        messages.append(Message("system", system))
    messages += turns_of(values.get(column), column)
    tools, turns = _first(values, c.tools, "functions"), as_list(values.get(column))
    if not given(tools) and isinstance(turns, list):  # ChatGLM3 keeps them in the system's turn
        tools = next((t["tools"] for t in turns if given(t.get("tools"))), None)
    return as_conversation(messages, _as_tools(tools))


def tools_of(values: Values, c: Columns) -> str:
    """What may be called by the row's own column, as JSON text; nothing where it has none."""
    return _as_tools(_first(values, c.tools))


def _as_tools(tools: object) -> str:
    """What may be called, as JSON text; nothing where the row names none."""
    if isinstance(tools, str):
        return tools
    return as_json(tools) if tools else ""


def text_or_turns(value: object, column: str) -> object:
    """The turns that a text holds; any other value as it is: a text such as [1, 2, 3] is a text.

    Raises:
        BadRow: It looks like turns, and cannot be read as a list.
    """
    found = as_list(value)
    if isinstance(found, list) and found and all(map(_is_turn, found)):
        return found
    if isinstance(found, CsvCell) and LIKE_TURNS.match(found):
        raise BadRow(
            Bilingual(
                f"looks like turns in {column!r}, and cannot be read as a list: {short(value)}",
                f"的 {column!r} 像是多轮对话，但无法作为列表读取：{short(value)}",
            )
        )
    return value


def _is_turn(value: object) -> bool:
    """Whether a role says something, and not only {from, to} of something else."""
    if not isinstance(value, dict):
        return False
    named, says = _first(value, "role", "from"), ("content", "value", "tool_calls", "function_call")
    return isinstance(named, str) and named.lower() in ROLES and any(name in value for name in says)


def turns_of(turns: object, column: str) -> list[Message]:
    turns = as_list(turns)
    if isinstance(turns, list | tuple) and turns and all(isinstance(turn, str) for turn in turns):
        raise BadRow(
            Bilingual(
                f"has a list of texts in {column!r}: one text belongs there, or a list of turns {{role, content}}",
                f"的 {column!r} 是文本的列表：应为一段文本，或由 {{role, content}} 组成的列表",
            )
        )
    if not isinstance(turns, list | tuple) or not turns:
        raise BadRow(Bilingual(f"has no list of turns in {column!r}", f"的 {column!r} 不是对话的列表"))
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        try:
            messages.append(_message(turn))
        except BadRow as problem:
            wrong = problem.text
            raise BadRow(
                Bilingual(f"turn {number} of {column!r} {wrong}", f"{column!r} 的第 {number} 轮{local(wrong, 'zh')}")
            ) from None
    return messages


def _message(turn: object) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(Bilingual("is not an object", "不是对象"))
    named = str(_first(turn, "role", "from")).lower()
    role = ROLES.get(named)
    if role is None:
        given_role, roles = _first(turn, "role", "from"), ", ".join(ROLES)
        raise BadRow(
            Bilingual(
                f"has the role {given_role!r}, which is not one of {roles}",
                f"的角色 {given_role!r} 不是 {roles} 之一",
            )
        )
    for name in MEDIA:
        if given(turn.get(name)):
            raise BadRow(text_only(name))
    content, reasoning = _content(_first(turn, "content", "value"), role)
    if role == "user" and (mark := media_in(content)):
        raise BadRow(_not_text(mark))
    reasoning = _reasoning(turn, role) or reasoning
    trained = _trained(turn, role)
    if named in CALLING:
        if not (calls := _calls(content)):
            raise BadRow(
                Bilingual(
                    f"is a {named} whose value is no {{name, arguments}}: {shortened(content, 60)!r}",
                    f"的 {named} 的值不是 {{name, arguments}}：{shortened(content, 60)!r}",
                )
            )
        return Message(role, "", calls=calls, reasoning=reasoning, trained=trained)
    calls = _calls(_first(turn, "tool_calls", "function_call") or [])
    if calls is None:
        raise BadRow(Bilingual("has a tool call without name and arguments", "有一个没有 name 和 arguments 的工具调用"))
    if calls and role != "assistant":
        raise BadRow(Bilingual(f"has a tool call, and is the {role}'s", f"有工具调用，但角色是 {role}"))
    name, call_id = (as_text(turn.get(n)) if role == "tool" else "" for n in ("name", "tool_call_id"))
    return Message(role, content, calls=calls, reasoning=reasoning, trained=trained, name=name, call_id=call_id)


def _content(content: object, role: Role) -> tuple[str, str]:
    """(the text of a turn, the reasoning in front of it)."""
    if isinstance(content, dict):
        if role == "tool":  # what a tool answers is data
            return as_json(content), ""
        raise BadRow(
            Bilingual(
                f"has an object for its content, not text: {short(content)}",
                f"的内容是对象，而不是文本：{short(content)}",
            )
        )
    if not isinstance(content, list | tuple):
        return as_text(content), ""
    words, thoughts = "", ""
    for part in content:  # OpenAI's and Anthropic's parts
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if isinstance(part, str):
            words += part
        elif (
            isinstance(part, dict)
            and kind in ("text", "input_text", "output_text")
            and isinstance(part.get("text"), str)
        ):
            words += part["text"]
        elif isinstance(part, dict) and kind == "thinking" and isinstance(part.get("thinking"), str):
            thoughts += part["thinking"]
        else:
            raise BadRow(
                Bilingual(
                    f"holds more than text: a part of the type {kind!r}", f"含有文本之外的内容：类型为 {kind!r} 的部分"
                )
            )
    return words, thoughts


def _reasoning(turn: Values, role: Role) -> str:
    found = {name: turn[name] for name in REASONING if given(turn.get(name))}
    if not found:
        return ""
    name, text = next(iter(found.items()))
    if role != "assistant":
        raise BadRow(
            Bilingual(
                f"has {name!r}, and is the {role}'s: only the assistant thinks in front of its answer",
                f"有 {name!r}，但角色是 {role}：只有助手在回答前思考",
            )
        )
    if not isinstance(text, str) or any(other != text for other in found.values()):
        raise BadRow(
            Bilingual(
                f"has {' and '.join(map(repr, found))}, which are not one text",
                f"同时有 {' 和 '.join(map(repr, found))}，不是一段文本",
            )
        )
    return text


def _trained(turn: Values, role: Role) -> bool:
    """Whether the data marks this turn as one to learn."""
    if given(turn.get("mask")):
        raise BadRow(
            Bilingual(
                "has 'mask', which some programs mean as `learn this` and others as `leave this out`; say train: false",
                "有 'mask'，有的程序用它表示“要学习”，有的表示“不学习”；请写 train: false",
            )
        )
    if detail := next((name for name in DETAILS if given(turn.get(name))), None):
        raise BadRow(
            Bilingual(
                f"has {detail!r}: a turn is learned as a whole, or not at all",
                f"有 {detail!r}：每轮要么整轮学习，要么完全不学",
            )
        )
    marks = {name: turn[name] for name in MARKS if given(turn.get(name))}
    for name, value in marks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadRow(
                Bilingual(
                    f"has {name!r}: {value!r}; allowed are true and false, or 1 and 0",
                    f"有 {name!r}：{value!r}；只能是 true、false、1 或 0",
                )
            )
    if len(set(map(bool, marks.values()))) > 1:
        raise BadRow(
            Bilingual(
                f"has {' and '.join(map(repr, marks))}, which contradict each other",
                f"有 {' 和 '.join(map(repr, marks))}，互相矛盾",
            )
        )
    wanted = bool(next(iter(marks.values()), role == "assistant"))
    if wanted and role != "assistant":
        raise BadRow(
            Bilingual(
                f"is to be learned ({next(iter(marks))!r}), and is the {role}'s: only the assistant's turns are",
                f"标为要学习（{next(iter(marks))!r}），但角色是 {role}：只学习助手的各轮",
            )
        )
    return wanted or role != "assistant"


def _calls(value: object) -> tuple[Call, ...] | None:
    """Calls of tools, one or a list of them, as objects or as JSON text; None where it is something else."""
    if isinstance(value, str):
        try:
            value = parse_json(value, foreign=True)
        except JsonError:
            return None
    calls = [_call(raw) for raw in (value if isinstance(value, list | tuple) else [value])]
    return None if None in calls else tuple(call for call in calls if call is not None)


def _call(value: object) -> Call | None:
    if not isinstance(value, dict):
        return None
    function = value.get("function") if isinstance(value.get("function"), dict) else value
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = _first(function, "arguments", "parameters")
    if not isinstance(arguments, str):
        arguments = as_json({} if arguments is None else arguments)
    return Call(function["name"], arguments, as_text(value.get("id")))


def _not_text(mark: str) -> Bilingual:
    return Bilingual(
        f"holds {mark}, the place of something that is not text: siliang trains on text alone",
        f"含有 {mark}，这里不是文本：siliang 只用文本训练",
    )


def as_conversation(messages: list[Message], tools: str = "") -> Result:
    talk = [m for m in messages if m.role != "system"]
    if not any(m.role == "assistant" for m in talk):
        return Bilingual(
            "has no turn of the assistant: there is nothing to learn", "没有 assistant 的发言，没有可学习的内容"
        )
    if talk[0].role != "user":
        first = talk[0].role
        return Bilingual(f"begins with the {first}, not with the user", f"以 {first} 开头，而不是 user")
    for number, m in enumerate(messages, start=1):
        if m.role == "assistant" and is_blank(m.content) and not m.calls:
            return Bilingual(f"has an empty answer in turn {number}", f"第 {number} 轮的回答为空")
        if m.role == "user" and is_blank(m.text):
            return Bilingual(f"has an empty question in turn {number}", f"第 {number} 轮的问题为空")
    if talk[-1].role != "assistant":
        last = talk[-1].role
        return Bilingual(f"ends with the {last}, without an answer", f"以 {last} 结尾，没有回答")
    if not any(m.trained for m in talk if m.role == "assistant"):
        return Bilingual(
            "marks every answer as one that is not learned: there is nothing to learn",
            "的所有回答都标记为不学习，没有可学习的内容",
        )
    return Conversation(tuple(messages), tools.strip())


def read_pair(instruction: str, output: str) -> Callable[[Values, Columns], Result]:
    def read(values: Values, c: Columns) -> Result:
        asked, answered = getattr(c, instruction), getattr(c, output)
        refuse_other_lessons(values, c, (asked, answered))
        turns = {
            column: text_or_turns(held, column) if isinstance(held := values.get(column), CsvCell) else held
            for column in (asked, answered)
        }
        if any(isinstance(held, list | tuple) for held in turns.values()):
            return _prompt_and_completion({**values, **turns}, c, asked, answered)
        about = "" if c.input == asked else cell(values, c.input)
        question, answer = cell(values, asked), cell(values, answered)
        if is_blank(answer):
            return Bilingual(f"has an empty {answered!r}", f"的 {answered!r} 为空")
        if is_blank(question) and is_blank(about):
            return Bilingual(f"has an empty {asked!r}", f"的 {asked!r} 为空")
        if mark := media_in(f"{question}\n{about}"):
            return _not_text(mark)
        messages = [Message("user", question, about), Message("assistant", answer)]
        if system := cell(values, c.system).strip():
            messages.insert(0, Message("system", system))
        for before, after in history_of(values):  # the oldest first
            messages[-2:-2] = [Message("user", before), Message("assistant", after)]
        return as_conversation(messages)

    return read


def _prompt_and_completion(values: Values, c: Columns, asked: str, answered: str) -> Result:
    """TRL's conversations in two columns: the completion is learned, answers in the prompt are not."""
    prompt, completion = values.get(asked), values.get(answered)
    before = [Message("user", as_text(prompt))] if not isinstance(prompt, list | tuple) else turns_of(prompt, asked)
    if isinstance(completion, list | tuple):
        after = turns_of(completion, answered)
    else:
        after = [Message("assistant", cell(values, answered))]
    if system := cell(values, c.system).strip():
        before.insert(0, Message("system", system))
    if c.input != asked and not is_blank(cell(values, c.input)):
        raise BadRow(
            Bilingual(
                f"has turns and also a text in {c.input!r}: write the text into the turn that it belongs to",
                f"有多轮对话，{c.input!r} 中又有一段文本：请把它写进所属的那一轮",
            )
        )
    return as_conversation([*(replace(m, trained=m.role != "assistant") for m in before), *after], tools_of(values, c))


def history_of(values: Values) -> list[tuple[str, str]]:
    """LLaMA-Factory's `history`: earlier rounds as [question, answer]."""
    history = as_list(values.get("history"))
    if is_blank(history):
        return []
    rounds = history if isinstance(history, list | tuple) else [history]
    pairs = [held for held in rounds if isinstance(held, list | tuple) and len(held) == 2]
    if len(pairs) != len(rounds):
        raise BadRow(
            Bilingual(
                f"has a 'history' that is not a list of [question, answer]: {short(history)}",
                f"的 'history' 不是 [问，答] 的列表：{short(history)}",
            )
        )
    return [(as_text(asked), as_text(answered)) for asked, answered in pairs]
