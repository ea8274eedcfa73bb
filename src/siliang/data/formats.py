"""The layouts of rows that people use, recognised by their columns: one table, one function each."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from siliang.config import Columns
from siliang.data.examples import (
    Call,
    Conversation,
    Example,
    Labelled,
    Message,
    Prepared,
    Role,
    SourceTarget,
    Span,
    Tagged,
    Text,
)
from siliang.types import DataError, TaskType, nearest

Values = dict[str, Any]
Result = Example | str  # an example, or what is wrong with the row

CAUSAL, CLASSES, TAGS = TaskType.CAUSAL_LM, TaskType.SEQ_CLS, TaskType.TOKEN_CLS
SEQ2SEQ, SPANS = TaskType.SEQ_2_SEQ_LM, TaskType.QUESTION_ANS


@dataclass(frozen=True)
class Format:
    """One layout.

    Attributes:
        needs: The columns that it must have, by their names in `Columns`.
        tasks: What can be trained on it.
        read: A row's values to an example, or to what is wrong with it.
        fixed: Columns that it must have and that go by this one name only.
    """

    name: str
    needs: tuple[str, ...]
    tasks: tuple[TaskType, ...]
    read: Callable[[Values, Columns], Result]
    fixed: tuple[str, ...] = ()


# Other names that data sets use for the same thing; looked at only where the usual name is not there.
ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("conversation",),
    "prompt": ("question", "query"),
    "completion": ("response", "answer"),
    "tags": ("ner_tags", "pos_tags", "labels"),
    "source": ("document", "article"),
    "target": ("summary", "title", "highlights"),
    "text": ("sentence1", "text_a", "premise", "question1"),
    "text_pair": ("sentence2", "text_b", "hypothesis", "question2"),
}


def find_format(
    name: str, found: Collection[str], task: TaskType, columns: Columns, source: str
) -> tuple[Format, Columns]:
    """The layout of rows that have the columns `found`, and the columns' names with aliases put in.

    Raises:
        DataError: None fits, or the one that was named does not.
    """
    suited = [f for f in FORMATS.values() if task in f.tasks]
    if name != "auto":
        wanted = FORMATS[name]
        if task not in wanted.tasks:
            raise DataError(
                f"data.format = {name!r} is not for {task.lower()}; allowed: {', '.join(f.name for f in suited)}."
            )
        suited = [wanted]
    for layout in suited:
        named = _resolve(layout, found, columns)
        if named is not None:
            return layout, named
    raise DataError(_no_format(suited, found, columns, source))


def _resolve(layout: Format, found: Collection[str], columns: Columns) -> Columns | None:
    if any(name not in found for name in layout.fixed):
        return None
    changes: dict[str, str] = {}
    for need in layout.needs:
        name = getattr(columns, need)
        if name in found:
            continue
        usual = name == Columns.model_fields[need].default
        other = next((a for a in ALIASES.get(need, ()) if usual and a in found), None)
        if other is None and layout.name == "text-label" and need == "text" and usual:
            rest = [c for c in found if c != columns.label]
            other = rest[0] if len(rest) == 1 and len(found) == 2 else None  # two columns: the other one is the text
        if other is None:
            return None
        changes[need] = other
    return columns.model_copy(update=changes)


def _no_format(suited: list[Format], found: Collection[str], columns: Columns, source: str) -> str:
    there = ", ".join(map(repr, found))

    # the layout of which most is there, so that one name is spoken of and not ten
    def share(layout: Format) -> float:
        names = [getattr(columns, n) for n in layout.needs] + list(layout.fixed)
        return sum(n in found for n in names) / len(names)

    best = max(suited, key=lambda f: (share(f), not f.fixed))
    keys = {getattr(columns, n): n for n in best.needs} | dict.fromkeys(best.fixed, "")
    name = next(n for n in keys if n not in found)
    hint = nearest(name, found)
    return (
        f"{source} has no column {name!r}; it has {there}.{hint}\n"
        f"Say which is which with data.columns (data.columns.{keys[name] or 'text'}=NAME), or data.header where the "
        f"file has no header line. Layouts for this task: {', '.join(f.name for f in suited)}."
    )


def as_text(value: Any) -> str:
    """A cell as text; None is empty."""
    return "" if value is None else value if isinstance(value, str) else str(value)


# ---- conversations ----

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def _messages(values: Values, c: Columns, column: str) -> Result:
    turns = values.get(column)
    if not isinstance(turns, list | tuple) or not turns:
        return f"has no list of turns in {column!r}"
    messages: list[Message] = []
    if system := as_text(values.get(c.system)).strip():
        messages.append(Message("system", system))
    for number, turn in enumerate(turns, start=1):
        message = _message(turn)
        if isinstance(message, str):
            return f"turn {number} of {column!r} {message}"
        messages.append(message)
    tools = values.get(c.tools)
    return _conversation(
        messages, tools if isinstance(tools, str) or not tools else json.dumps(tools, ensure_ascii=False)
    )


def _message(turn: Any) -> Message | str:
    if not isinstance(turn, dict):
        return "is no object"
    named = turn.get("role", turn.get("from"))
    role = ROLES.get(str(named).lower())
    if role is None:
        return f"has the role {named!r}, which is not one of {', '.join(ROLES)}"
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):  # OpenAI's parts
        if any(not isinstance(part, dict) or "text" not in part for part in content):
            return "holds more than text"
        content = "".join(as_text(part["text"]) for part in content)
    content = as_text(content)
    calls: list[Call] = []
    if named == "function_call":
        call = _call(content)
        if call is None:
            return f"is a function_call whose value is no {{name, arguments}}: {content[:60]!r}"
        return Message(role, "", calls=(call,))
    for raw in turn.get("tool_calls") or ():
        call = _call(raw.get("function", raw) if isinstance(raw, dict) else raw)
        if call is None:
            return "has a tool call without name and arguments"
        calls.append(call)
    return Message(role, content, calls=tuple(calls))


def _call(value: Any) -> Call | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    return Call(value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


def _conversation(messages: list[Message], tools: str | None = None) -> Result:
    talk = [m for m in messages if m.role != "system"]
    if not any(m.role == "assistant" for m in talk):
        return "has no turn of the assistant: there is nothing to learn"
    if talk[0].role != "user":
        return f"begins with the {talk[0].role}, not with the user"
    for number, m in enumerate(messages, start=1):
        if m.role == "assistant" and not m.content.strip() and not m.calls:
            return f"has an empty answer in turn {number}"
        if m.role == "user" and not m.text.strip():
            return f"has an empty question in turn {number}"
    if talk[-1].role != "assistant":
        return f"ends with the {talk[-1].role}, whom nobody answers"
    return Conversation(tuple(messages), (tools or "").strip())


def _pair(instruction: str, output: str) -> Callable[[Values, Columns], Result]:
    def read(values: Values, c: Columns) -> Result:
        question, answer = as_text(values.get(getattr(c, instruction))), as_text(values.get(getattr(c, output)))
        if not answer.strip():
            return f"has an empty {getattr(c, output)!r}"
        about = as_text(values.get(c.input)) if instruction == "instruction" else ""
        if not question.strip() and not about.strip():
            return f"has an empty {getattr(c, instruction)!r}"
        messages = [Message("user", question, about), Message("assistant", answer)]
        if system := as_text(values.get(c.system)).strip():
            messages.insert(0, Message("system", system))
        for asked, answered in reversed(_history(values)):
            messages[-2:-2] = [Message("user", asked), Message("assistant", answered)]
        return _conversation(messages)

    return read


def _history(values: Values) -> list[tuple[str, str]]:
    """LLaMA-Factory's `history`: earlier rounds as [question, answer]."""
    history = values.get("history")
    if not isinstance(history, list):
        return []
    return [(as_text(h[0]), as_text(h[1])) for h in history if isinstance(h, list | tuple) and len(h) == 2]


# ---- the rest ----


def _text(values: Values, c: Columns) -> Result:
    text = as_text(values.get(c.text))
    return Text(text) if text.strip() else f"has an empty {c.text!r}"


def _labelled(values: Values, c: Columns) -> Result:
    text, label = as_text(values.get(c.text)), as_text(values.get(c.label))
    if not text.strip():
        return f"has an empty {c.text!r}"
    return Labelled(text, label) if label.strip() else f"has an empty {c.label!r}"


def _sentence_pair(values: Values, c: Columns) -> Result:
    made = _labelled(values, c)
    pair = as_text(values.get(c.text_pair))
    if isinstance(made, str) or not pair.strip():
        return made if isinstance(made, str) else f"has an empty {c.text_pair!r}"
    assert isinstance(made, Labelled)
    return Labelled(made.text, made.label, pair)


def _tagged(values: Values, c: Columns) -> Result:
    tokens, tags = values.get(c.tokens), values.get(c.tags)
    if not isinstance(tokens, list) or not isinstance(tags, list):
        return f"must hold lists in {c.tokens!r} and {c.tags!r}"
    if not tokens:
        return f"has an empty {c.tokens!r}"
    if len(tokens) != len(tags):
        return f"has {len(tokens)} tokens and {len(tags)} tags"
    return Tagged(tuple(map(as_text, tokens)), tuple(map(as_text, tags)))


def _squad(values: Values, c: Columns) -> Result:
    context, question, answers = as_text(values.get(c.context)), as_text(values.get(c.question)), values.get(c.answers)
    if not context.strip() or not question.strip():
        return f"has an empty {c.context if not context.strip() else c.question!r}"
    if isinstance(answers, list):  # the original files: [{text, answer_start}]
        answers = {key: [a.get(key) for a in answers if isinstance(a, dict)] for key in ("text", "answer_start")}
    if not isinstance(answers, dict) or "text" not in answers or "answer_start" not in answers:
        return f"must hold text and answer_start in {c.answers!r}"
    found, starts = answers["text"], answers["answer_start"]
    if not isinstance(found, list) or not isinstance(starts, list) or len(found) != len(starts):
        return f"must hold as many texts as starts in {c.answers!r}"
    if not all(isinstance(s, int) for s in starts) or not all(isinstance(t, str) for t in found):
        return f"must hold texts and whole numbers in {c.answers!r}"
    return Span(question, context, tuple(map(str, found)), tuple(int(s) for s in starts if s is not None))


def _source_target(values: Values, c: Columns) -> Result:
    source, target = as_text(values.get(c.source)), as_text(values.get(c.target))
    if not source.strip() or not target.strip():
        return f"has an empty {c.source if not source.strip() else c.target!r}"
    return SourceTarget(source, target)


def _prepared(values: Values, c: Columns) -> Result:
    ids, labels = values.get("input_ids"), values.get("labels")
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
        return "must hold a list of whole numbers in 'input_ids'"
    if labels is not None and not (isinstance(labels, list) and len(labels) == len(ids)):
        return f"must hold a list of {len(ids)} whole numbers in 'labels'"
    labels = labels or []
    if not all(isinstance(i, int) for i in labels):
        return "must hold whole numbers in 'labels'"
    mask = values.get("attention_mask")
    if isinstance(mask, list) and len(mask) == len(ids):  # padding that was put there is taken off again
        kept = [i for i, on in enumerate(mask) if on]
        ids, labels = [ids[i] for i in kept], [labels[i] for i in kept] if labels else []
    return Prepared(tuple(ids), tuple(labels))


def as_source_target(made: Result) -> Result:
    """A conversation of one round as a source and its target, for encoder-decoder models."""
    if not isinstance(made, Conversation):
        return made
    talk = [m for m in made.messages if m.role != "system"]
    if len(talk) != 2:
        return f"has {len(talk)} turns; {TaskType.SEQ_2_SEQ_LM.lower()} learns from one question and its answer"
    return SourceTarget(talk[0].text, talk[1].content)


def _asked(instruction: str, output: str) -> Format:
    name = "alpaca" if instruction == "instruction" else f"{instruction}-{output}"
    return Format(name, (instruction, output), (CAUSAL, SEQ2SEQ), _pair(instruction, output))


FORMATS: dict[str, Format] = {
    layout.name: layout
    for layout in (
        Format("prepared", (), (CAUSAL,), _prepared, fixed=("input_ids",)),
        Format("messages", ("messages",), (CAUSAL,), lambda v, c: _messages(v, c, c.messages)),
        Format("sharegpt", (), (CAUSAL,), lambda v, c: _messages(v, c, "conversations"), fixed=("conversations",)),
        _asked("instruction", "output"),
        _asked("prompt", "completion"),
        _asked("input", "output"),
        Format("source-target", ("source", "target"), (SEQ2SEQ,), _source_target),
        Format("sentence-pair", ("text", "text_pair", "label"), (CLASSES,), _sentence_pair),
        Format("text-label", ("text", "label"), (CLASSES,), _labelled),
        Format("tokens-tags", ("tokens", "tags"), (TAGS,), _tagged),
        Format("squad", ("context", "question", "answers"), (SPANS,), _squad),
        Format("text", ("text",), (CAUSAL,), _text),
    )
}
