"""The layouts of rows that people use, recognised by their columns: one table, one function each."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Collection, Mapping
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
from siliang.data.text_files import INVISIBLE
from siliang.types import DataError, TaskType

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
        optional: Columns that it uses where they are there, by their names in `Columns`.
        beside: The same of columns that go by one name only.
    """

    name: str
    needs: tuple[str, ...]
    tasks: tuple[TaskType, ...]
    read: Callable[[Values, Columns], Result]
    fixed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def example(self, values: Values, columns: Columns) -> Result:
        """A row's values as an example, or what is wrong with the row."""
        try:
            return self.read(values, columns)
        except BadRow as problem:
            return str(problem)

    def taken(self, columns: Columns) -> dict[str, str]:
        """The column of each of its parts, where the rows have it."""
        named = {need: getattr(columns, need) for need in (*self.needs, *self.optional)}
        return named | {name: name for name in (*self.fixed, *self.beside)}


# Other names that data sets use for the same thing; looked at only where the usual name is not there.
ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("conversation",),
    "prompt": ("question", "query"),
    "completion": ("response", "answer"),
    "tags": ("ner_tags", "pos_tags", "labels"),
    "source": ("document", "article"),
    "target": ("summary", "title", "highlights"),
}
FIRST_OF_PAIR = ("sentence1", "text_a", "premise", "question1")
SECOND_OF_PAIR = ("sentence2", "text_b", "hypothesis", "question2")
# of a text with a class: taken where one of them alone is there
TEXTS = ("review", "sentence", "content", "comment", "tweet", "utterance", "document", "评论", "内容", "文本")
# what a class may be called: proposed, not taken
CLASSES_NAMED = ("labels", "class", "category", "cat", "sentiment", "target", "intent", "topic", "标签", "类别")
NUMBERS_NAMED = ("score", "rating", "stars", "similarity", "similarity_score", "value")
ALIKE = 0.7  # of two names, from where on one may be meant by the other


def find_format(
    name: str, found: Collection[str], task: TaskType, columns: Columns, source: str
) -> tuple[Format, Columns]:
    """The layout of rows that have the columns `found`, and the columns' names with aliases put in.

    Args:
        found: The columns' names; as a mapping, with the cells of the first row.

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
        other = next((a for a in _aliases(layout, need) if usual and a in found), None)
        if other is None and layout.name == "text-label" and need == "text" and usual:
            other = _text_beside(found, columns)
        if other is None:
            return None
        changes[need] = other
    return columns.model_copy(update=changes)


def _aliases(layout: Format, need: str) -> tuple[str, ...]:
    if layout.name == "sentence-pair":
        return {"text": FIRST_OF_PAIR, "text_pair": SECOND_OF_PAIR}.get(need, ())
    return ALIASES.get(need, ())


def _text_beside(found: Collection[str], columns: Columns) -> str | None:
    """The text's column where it is certain: the one with a usual name, or the only one beside the label."""
    rest = [c for c in found if c != columns.label]
    usual = [c for c in rest if c.lower() in TEXTS]
    if len(usual) == 1:
        return usual[0]
    if len(rest) != 1 or len(found) != 2:
        return None
    value = found[rest[0]] if isinstance(found, Mapping) else ""
    return None if isinstance(value, int | float) or _as_number(value) is not None else rest[0]


def _as_number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, str | int | float) else None
    except ValueError:
        return None


def _no_format(suited: list[Format], found: Collection[str], columns: Columns, source: str) -> str:
    there = ", ".join(map(repr, found))

    # the layout of which most is there, so that one is spoken of and not ten
    def share(layout: Format) -> float:
        names = [getattr(columns, n) for n in layout.needs] + list(layout.fixed)
        return sum(n in found for n in names) / len(names)

    best = max(suited, key=lambda f: (share(f), not f.fixed, -len(f.needs)))
    keys = {getattr(columns, n): n for n in best.needs} | dict.fromkeys(best.fixed, "")
    missing = [n for n in keys if n not in found]
    free = [c for c in found if c not in keys]
    other = _no_classes(free, found) if "label" in best.needs and columns.label in missing else ""
    said = f"{source} has no column {(columns.label if other else missing[0])!r}; it has {there}.{other}"
    if odd := next((c for c in found if any(mark in c for mark in ";|\t")), None):
        mark = next(m for m in ";|\t" if m in odd)
        return f"{said}\nWhere {mark!r} separates its columns, say so: data.separator={mark!r}."
    named = " ".join(f"data.columns.{keys[name]}={_meant(keys[name], name, free)}" for name in missing if keys[name])
    how = f"Say which is which with {named}" if named else f"{best.name} needs {', '.join(map(repr, missing))}"
    return (
        f"{said}\n{how}; or name the columns with data.header where the file has no header line. Layouts for this "
        f"task: {', '.join(f.name for f in suited)}."
    )


def _no_classes(free: list[str], found: Collection[str]) -> str:
    """What there is in the place of a class, if it shows."""
    for column in free:
        value = found[column] if isinstance(found, Mapping) else None
        if isinstance(value, list):
            return f" {column!r} holds lists: {SEVERAL}."
        number = _as_number(value)
        if column.lower() in NUMBERS_NAMED and number is not None:
            return f" {column!r} holds numbers such as {value}: {REGRESSION}."
    return ""


def _meant(need: str, name: str, free: list[str]) -> str:
    """The column that may be meant by a name, or NAME."""
    usual = {"text": TEXTS, "label": CLASSES_NAMED}.get(need, ALIASES.get(need, ()))
    known = [c for c in free if c.strip().lower() in usual]
    alike = sorted(free, key=lambda c: -_likeness(c, name))
    near = [c for c in alike if _likeness(c, name) >= ALIKE]
    return next(iter([*near, *known]), "NAME")


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.strip().lower(), other.lower()).ratio()


BLANKS = " \t\r\n\v\f\xa0\u3000" + INVISIBLE
REGRESSION = "a number to be estimated is a regression, and seq_cls learns classes"
SEVERAL = "several labels for one text, and seq_cls learns one class for each"


class BadRow(Exception):  # noqa: N818  # not an error of the program: it never leaves this file
    """A row that cannot be used; its text says what is wrong with it."""


def as_text(value: Any, name: str = "") -> str:
    """A cell as text; None is empty.

    Args:
        name: The column, for the error.

    Raises:
        BadRow: It is a list, an object, bytes or no number.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    what = {list: "a list", tuple: "a list", dict: "an object", bytes: "bytes"}.get(type(value))
    if isinstance(value, float) and not math.isfinite(value):
        what = "NaN" if math.isnan(value) else "an infinite number"
    if what is None:
        return str(value)
    raise BadRow(f"has {what} in {name!r}" if name else f"has {what} where text belongs")


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
        asked, given = getattr(c, instruction), getattr(c, output)
        question, answer = as_text(values.get(asked), asked), as_text(values.get(given), given)
        if not answer.strip():
            return f"has an empty {getattr(c, output)!r}"
        about = as_text(values.get(c.input), c.input) if instruction == "instruction" else ""
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


def _cell(values: Values, name: str) -> str:
    """A cell that must hold text.

    Raises:
        BadRow: It is not there, holds something else, or is empty.
    """
    if name not in values:
        raise BadRow(f"has no field {name!r}")
    text = as_text(values[name], name)
    if not text.strip(BLANKS):
        raise BadRow(f"has an empty {name!r}")
    return text


def _text(values: Values, c: Columns) -> Result:
    return Text(_cell(values, c.text))


def _label(values: Values, name: str) -> str:
    if isinstance(values.get(name), list | tuple):
        raise BadRow(f"has a list in {name!r}: {SEVERAL}")
    return _cell(values, name)


def _labelled(values: Values, c: Columns) -> Result:
    return Labelled(_cell(values, c.text), _label(values, c.label))


def _sentence_pair(values: Values, c: Columns) -> Result:
    return Labelled(_cell(values, c.text), _label(values, c.label), _cell(values, c.text_pair))


def _tagged(values: Values, c: Columns) -> Result:
    tokens, tags = values.get(c.tokens), values.get(c.tags)
    if not isinstance(tokens, list) or not isinstance(tags, list):
        return f"must hold lists in {c.tokens!r} and {c.tags!r}"
    if not tokens:
        return f"has an empty {c.tokens!r}"
    if len(tokens) != len(tags):
        return f"has {len(tokens)} tokens and {len(tags)} tags"
    made = Tagged(tuple(as_text(t, c.tokens) for t in tokens), tuple(as_text(t, c.tags) for t in tags))
    return made if all(tag.strip(BLANKS) for tag in made.tags) else f"has an empty tag in {c.tags!r}"


def _squad(values: Values, c: Columns) -> Result:
    context, question, answers = _cell(values, c.context), _cell(values, c.question), values.get(c.answers)
    if isinstance(answers, list):  # the original files: [{text, answer_start}]
        answers = {key: [a.get(key) for a in answers if isinstance(a, dict)] for key in ("text", "answer_start")}
    if not isinstance(answers, dict) or "text" not in answers or "answer_start" not in answers:
        return f"must hold text and answer_start in {c.answers!r}"
    found, starts = answers["text"], answers["answer_start"]
    if not isinstance(found, list) or not isinstance(starts, list) or len(found) != len(starts):
        return f"must hold as many texts as starts in {c.answers!r}"
    if not all(type(s) is int for s in starts) or not all(isinstance(t, str) for t in found):
        return f"must hold texts and whole numbers in {c.answers!r}"
    return Span(question, context, tuple(found), tuple(starts))


def misplaced(example: Span) -> str | None:
    """What is wrong with the place of an answer."""
    for text, start in zip(example.answers, example.starts, strict=True):
        if start < 0 or example.context[start : start + len(text)] != text:
            return f"has the answer {text[:40]!r}, which does not stand at its start ({start})"
    return None


def _source_target(values: Values, c: Columns) -> Result:
    return SourceTarget(_cell(values, c.source), _cell(values, c.target))


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
    more = ("input", "system") if instruction == "instruction" else ("system",)
    read = _pair(instruction, output)
    return Format(name, (instruction, output), (CAUSAL, SEQ2SEQ), read, optional=more, beside=("history",))


BESIDE_TURNS = ("system", "tools")
FORMATS: dict[str, Format] = {
    layout.name: layout
    for layout in (
        Format("prepared", (), (CAUSAL,), _prepared, fixed=("input_ids",), beside=("labels", "attention_mask")),
        Format("messages", ("messages",), (CAUSAL,), lambda v, c: _messages(v, c, c.messages), optional=BESIDE_TURNS),
        Format(
            "sharegpt",
            (),
            (CAUSAL,),
            lambda v, c: _messages(v, c, "conversations"),
            fixed=("conversations",),
            optional=BESIDE_TURNS,
        ),
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
