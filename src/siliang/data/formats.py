"""The layouts of rows, recognised by their columns: a table of layouts, and a function that reads each."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any

from siliang.config import Columns, LayoutName
from siliang.data.encode import IGNORED
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
from siliang.data.json_stream import WrittenFloat
from siliang.data.numbers import as_number
from siliang.data.spec import DataSpec
from siliang.data.text_files import INVISIBLE
from siliang.safe_json import JsonError, parse_json
from siliang.secrets import shortened
from siliang.types import DataError, near

Values = dict[str, Any]
Result = Example | str  # an example, or what is wrong with the row


@dataclass(frozen=True)
class Format:
    """One layout.

    Attributes:
        needs: The required columns, by their names in `Columns`.
        read: A row's values to an example, or to what is wrong with it.
        fixed: Required columns that the user cannot rename.
        optional: Columns that are read if the row has them, by their names in `Columns`.
        beside: Optional columns that the user cannot rename.
    """

    name: LayoutName
    needs: tuple[str, ...]
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
        """The column's name for each part of the layout; the rows may lack the optional ones."""
        named = {need: getattr(columns, need) for need in (*self.needs, *self.optional)}
        return named | {name: name for name in (*self.fixed, *self.beside)}


# Other names of a column in published data sets; used only if the usual name is missing.
ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("conversation",),
    "prompt": ("question", "query"),
    "completion": ("response", "answer"),
    "tags": ("ner_tags", "pos_tags", "labels"),
    "source": ("document", "article"),
    "target": ("summary", "title", "highlights"),
}
# of columns that a layout has a use for and does not need
BESIDE: dict[str, tuple[str, ...]] = {"system": ("system_prompt",), "input": ("context",)}
FIRST_OF_PAIR = ("sentence1", "text_a", "premise", "question1")
SECOND_OF_PAIR = ("sentence2", "text_b", "hypothesis", "question2")
# whose names say that they are one: what is asked, and a text that answers it or not
QUESTIONS, ANSWERED = ("question", "query"), ("sentence", "text")
# other names of the text column of a classification: used if exactly one of them is there
TEXTS = ("review", "sentence", "content", "comment", "tweet", "utterance", "document", "评论", "内容", "文本")
# other names of the label column: proposed in the error, not used
CLASSES_NAMED = ("labels", "class", "category", "cat", "sentiment", "target", "intent", "topic", "标签", "类别")
NUMBERS_NAMED = ("score", "rating", "stars", "similarity", "similarity_score", "value")


def find_format(
    name: str, found: Collection[str], spec: DataSpec, columns: Columns, source: str
) -> tuple[Format, Columns]:
    """The layout of rows that have the columns `found`, and the columns' names with aliases put in.

    Args:
        found: The columns' names; as a mapping, with the cells of the first row.
        spec: Of the task, which says what layouts it reads.

    Raises:
        DataError: None fits, or the one that was named does not.
    """
    suited = [FORMATS[layout] for layout in spec.layouts]
    if name != "auto":
        wanted = FORMATS[name]
        if wanted not in suited:
            raise DataError(
                f"data.format = {name!r} is not for {spec.name}; allowed: {', '.join(f.name for f in suited)}."
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
    if layout.name == "sentence-pair" and (pair := _question_and_text(found, columns)):
        changes = dict(zip(("text", "text_pair"), pair, strict=True))
    for need in (n for n in layout.needs if n not in changes):
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
    for part in layout.optional:
        name = getattr(columns, part)
        if name not in found and name == Columns.model_fields[part].default:
            other = next((a for a in BESIDE.get(part, ()) if a in found), None)
            changes |= {part: other} if other else {}
    return columns.model_copy(update=changes)


def second_text(found: Collection[str], columns: Columns) -> str | None:
    """The column of a second text that these columns have, where they can be read as pairs of texts."""
    named = _resolve(FORMATS["sentence-pair"], found, columns)
    if named is None:
        return None
    return named.text if named.text_pair == columns.text else named.text_pair


def _question_and_text(found: Collection[str], columns: Columns) -> tuple[str, str] | None:
    """The two columns of a question and a text, where each is there once and nobody named others."""
    usual = all(getattr(columns, n) == Columns.model_fields[n].default for n in ("text", "text_pair"))
    if not usual or columns.text_pair in found or any(n in found for n in (*FIRST_OF_PAIR, *SECOND_OF_PAIR)):
        return None
    asked, texts = ([c for c in names if c in found and c != columns.label] for names in (QUESTIONS, ANSWERED))
    if len(asked) != 1 or len(texts) != 1:
        return None
    value = found[asked[0]] if isinstance(found, Mapping) else ""
    return (asked[0], texts[0]) if isinstance(value, str) and not _is_number(value) else None


def _aliases(layout: Format, need: str) -> tuple[str, ...]:
    if layout.name == "sentence-pair":
        return {"text": FIRST_OF_PAIR, "text_pair": SECOND_OF_PAIR}.get(need, ())
    return ALIASES.get(need, ())


def _text_beside(found: Collection[str], columns: Columns) -> str | None:
    """The text column, if it is certain: the one with a usual name, or the only one beside the label."""
    rest = [c for c in found if c != columns.label]
    usual = [c for c in rest if c.lower() in TEXTS]
    if len(usual) == 1:
        return usual[0]
    if len(rest) != 1 or len(found) != 2:
        return None
    value = found[rest[0]] if isinstance(found, Mapping) else ""
    return None if _is_number(value) else rest[0]


def _is_number(value: Any) -> bool:
    return as_number(value.strip()) is not None if isinstance(value, str) else isinstance(value, int | float)


def _no_format(suited: list[Format], found: Collection[str], columns: Columns, source: str) -> str:
    there = ", ".join(map(repr, found))

    # the error speaks of one layout only: the one most of whose columns are there
    def share(layout: Format) -> float:
        names = [getattr(columns, n) for n in layout.needs] + list(layout.fixed)
        return sum(n in found for n in names) / len(names)

    best = max(suited, key=lambda f: (share(f), not f.fixed, -len(f.needs)))
    keys = {getattr(columns, n): n for n in best.needs} | dict.fromkeys(best.fixed, "")
    missing = [n for n in keys if n not in found]
    free = [c for c in found if c not in keys]
    pair = _numbered_pair(free, found) if "label" in best.needs else None
    if pair is not None:
        missing = [columns.text, columns.text_pair, *([columns.label] if columns.label in missing else [])]
        best, keys = FORMATS["sentence-pair"], {getattr(columns, n): n for n in FORMATS["sentence-pair"].needs}
    other = _no_classes(free, found) if "label" in best.needs and columns.label in missing else ""
    said = f"{source} has no column {(columns.label if other else missing[0])!r}; it has {there}.{other}"
    spans = [c for c in free if isinstance(found, Mapping) and _are_spans(found[c])]
    if spans and best.name == "tokens-tags":
        return (
            f"{said} {spans[0]!r} holds spans of a text: token_cls learns a tag for each word, so write tokens and "
            'tags, such as {"tokens": ["hello", "Bob"], "tags": ["O", "B-PER"]}.'
        )
    if odd := next((c for c in found if any(mark in c for mark in ";|\t")), None):
        mark = next(m for m in ";|\t" if m in odd)
        return f"{said}\nWhere {mark!r} separates its columns, say so: data.separator={mark!r}."
    meant = {name: _meant(keys[name], name, free) for name in missing if keys[name]}
    if pair is not None:
        left = [c for c in free if c not in pair and not c.lower().endswith(("id", "id1", "id2", "index", "idx"))]
        meant.update(zip(missing, pair, strict=False))
        if meant.get(columns.label) == "NAME" and len(left) == 1 and not other:
            meant[columns.label] = left[0]
    named = " ".join(f"data.columns.{keys[name]}={column}" for name, column in meant.items())
    how = f"Say which is which with {named}" if named else f"{best.name} needs {', '.join(map(repr, missing))}"
    return (
        f"{said}\n{how}; or name the columns with data.header where the file has no header line. Layouts for this "
        f"task: {', '.join(f.name for f in suited)}."
    )


def _numbered_pair(free: list[str], found: Collection[str]) -> tuple[str, str] | None:
    """Two columns of texts whose names differ in what they end with alone: text1 and text2, question_a and question_b;
    or that usual pairs have."""
    for one in free:
        value = found[one] if isinstance(found, Mapping) else ""
        if not isinstance(value, str) or _is_number(value):
            continue
        others = [one[:-1] + {"1": "2", "a": "b", "A": "B"}.get(one[-1:], "")]
        others += [two for first, two in zip(FIRST_OF_PAIR, SECOND_OF_PAIR, strict=True) if one == first]
        if other := next((c for c in others if c in free and c != one), None):
            return one, other
    return None


def _are_spans(value: Any) -> bool:
    """Places in a text with their kind, as annotation tools write them."""
    return isinstance(value, list) and bool(value) and all(isinstance(held, list | tuple | dict) for held in value)


def _no_classes(free: list[str], found: Collection[str]) -> str:
    """Says which column looks like the label but holds lists or numbers; nothing if none does."""
    for column in free:
        value = found[column] if isinstance(found, Mapping) else None
        if isinstance(value, list):
            return f" {column!r} holds lists: {SEVERAL}."
        if column.lower() in NUMBERS_NAMED and _is_number(value):
            return f" {column!r} holds numbers such as {value}: {REGRESSION}."
    return ""


def _meant(need: str, name: str, free: list[str]) -> str:
    """The column that the user may mean by `name`, or the word NAME."""
    usual = {"text": TEXTS, "label": CLASSES_NAMED, "output": ("response", "answer", "completion")}.get(
        need, ALIASES.get(need, ())
    )
    known = [c for c in free if c.strip().lower() in usual]
    return next(iter([*near(name, free), *known]), "NAME")


BLANKS = " \t\r\n\v\f\xa0\u3000" + INVISIBLE
REGRESSION = "a number to be estimated is a regression, and seq_cls learns classes"
SEVERAL = "several labels for one text, and seq_cls learns one class for each"


class BadRow(Exception):  # noqa: N818  # about a row: who reads it catches this, and says where it stands
    """A row that cannot be used; its text says what is wrong with it."""


def as_text(value: Any, name: str = "") -> str:
    """A cell as text; None becomes an empty text.

    Args:
        name: The column, for the error.

    Raises:
        BadRow: It is a list, an object, bytes, NaN or infinite.
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


def cell(values: Values, column: str) -> str:
    """A row's cell as text; an empty text if the row has no such column."""
    return as_text(values.get(column), column)


def as_json(value: Any) -> str:
    """A value of the data as JSON text, its numbers as they were written.

    Raises:
        BadRow: It holds a value that JSON cannot express.
    """
    try:
        text = json.dumps(_with_marks(value), ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        raise BadRow(f"holds what is no JSON (NaN, bytes ...): {_short(value)}") from None
    return MARKED.sub(r"\1", text)


MARKED = re.compile(r'"\\u0000([-+.0-9eE]+)\\u0000"')


def _with_marks(value: Any) -> Any:
    """The value with its numbers as marked texts, which json does not rewrite, and its dates as texts."""
    if isinstance(value, dict):
        return {name: _with_marks(held) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [_with_marks(held) for held in value]
    if isinstance(value, WrittenFloat | Decimal):
        return f"\0{value}\0" if math.isfinite(value) else float(value)
    return str(value) if isinstance(value, date | time | timedelta) else value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return shortened(text, 60, " ...")


def _given(value: Any) -> bool:
    """Whether the field holds a value. Arrow and Parquet write null into fields that only other rows have."""
    return value is not None and not (isinstance(value, str | list | tuple | dict) and not value)


# ---- rows that must not be learned as they are ----

PREFERENCES = ("rejected", "chosen", "rejected_response", "rejected_responses", "rejected_messages")
WANTED = ("label", "kto_tag")  # KTO: false marks a wrong answer
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
PLACEHOLDERS = ("<image>", "<video>", "<audio>")


def _against_its_meaning(values: Values, c: Columns, columns: tuple[str, ...]) -> None:
    """Refuses a row that holds preferences, an answer marked as wrong, or pictures, sound or video.

    Args:
        columns: The columns that the layout reads. A preference column among them was chosen by the user as the answer.

    Raises:
        BadRow: It is such a row.
    """
    if not any(name in columns for name in PREFERENCES):
        for name in PREFERENCES:
            if _given(values.get(name)):
                raise BadRow(
                    f"has {name!r}: a better and a worse answer, and siliang learns answers, not preferences; "
                    "name the column of the answer to learn with data.columns, or take the other out"
                )
    for name in WANTED:
        value = values.get(name)
        if name == "label" and c.label != "label":
            continue  # the user has named another column as the label
        if (isinstance(value, int | float) and value == 0) or as_word(value) in ("false", "0"):
            raise BadRow(
                f"has {name!r}: {value!r}, which says that its answer is not to be given (KTO), and siliang learns "
                f"every answer as right; where {name!r} means something else, rename it"
            )
    for name in MEDIA:
        if name not in columns and _given(values.get(name)):
            raise BadRow(f"has {name!r}: siliang trains on text alone")


def as_word(value: Any) -> str:
    """A text in lower case without blanks around it; an empty text for any other value."""
    return value.strip().lower() if isinstance(value, str) else ""


def _media_in(text: str) -> str | None:
    """The placeholder of a picture, a video or a sound in a question; `<video>` and `<audio>` within prose are HTML."""
    bare = text.strip()
    for mark in PLACEHOLDERS:
        if bare.startswith(mark) or bare.endswith(mark) or (mark == "<image>" and mark in text):
            return mark
    return None


# ---- conversations ----

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
USED_OF = {"tool": ("name", "tool_call_id"), "system": ("tools",)}  # fields that only turns of this role may have


def unused_fields(values: Values, c: Columns) -> set[str]:
    """The fields of a row's turns that siliang does not use, as "messages[].name"."""
    found: set[str] = set()
    for column in (c.messages, "conversations", c.prompt, c.completion):
        turns = _listed(values.get(column)) if column in (c.messages, "conversations") else values.get(column)
        for turn in turns if isinstance(turns, list | tuple) else ():
            if isinstance(turn, dict):
                role = ROLES.get(str(_first(turn, "role", "from")).lower(), "user")
                used = USED.union(USED_OF.get(role, ()))
                found.update(f"{column}[].{name}" for name, value in turn.items() if name not in used and _given(value))
    return found


def _first(turn: dict[str, Any], *names: str) -> Any:
    """The first of these fields that is there and not null."""
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _messages(values: Values, c: Columns, column: str) -> Result:
    _against_its_meaning(values, c, (column,))
    messages: list[Message] = []
    if system := cell(values, c.system).strip():
        messages.append(Message("system", system))
    messages += _turns(values.get(column), column)
    tools, turns = _first(values, c.tools, "functions"), _listed(values.get(column))
    if not _given(tools) and isinstance(turns, list):  # ChatGLM3 keeps them in the system's turn
        tools = next((t["tools"] for t in turns if _given(t.get("tools"))), None)
    return _conversation(messages, tools if isinstance(tools, str) or not tools else as_json(tools))


def _listed(turns: Any) -> Any:
    """A list of turns that csv and some databases hold as JSON text; any other value as it is."""
    if isinstance(turns, str) and turns.strip().startswith("["):
        try:
            return parse_json(turns, foreign=True)
        except JsonError:
            return turns
    return turns


def _turns(turns: Any, column: str) -> list[Message]:
    turns = _listed(turns)
    if isinstance(turns, list | tuple) and turns and all(isinstance(turn, str) for turn in turns):
        raise BadRow(f"has a list of texts in {column!r}: one text belongs there, or a list of turns {{role, content}}")
    if not isinstance(turns, list | tuple) or not turns:
        raise BadRow(f"has no list of turns in {column!r}")
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        try:
            messages.append(_message(turn))
        except BadRow as problem:
            raise BadRow(f"turn {number} of {column!r} {problem}") from None
    return messages


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise BadRow("is no object")
    named = str(_first(turn, "role", "from")).lower()
    role = ROLES.get(named)
    if role is None:
        raise BadRow(f"has the role {_first(turn, 'role', 'from')!r}, which is not one of {', '.join(ROLES)}")
    for name in MEDIA:
        if _given(turn.get(name)):
            raise BadRow(f"has {name!r}: siliang trains on text alone")
    content, reasoning = _content(_first(turn, "content", "value"), role)
    if role == "user" and (mark := _media_in(content)):
        raise BadRow(f"holds {mark}, the place of something that is no text: siliang trains on text alone")
    reasoning = _reasoning(turn, role) or reasoning
    trained = _trained(turn, role)
    if named in CALLING:
        if not (calls := _calls(content)):
            raise BadRow(f"is a {named} whose value is no {{name, arguments}}: {shortened(content, 60)!r}")
        return Message(role, "", calls=calls, reasoning=reasoning, trained=trained)
    calls = _calls(_first(turn, "tool_calls", "function_call") or [])
    if calls is None:
        raise BadRow("has a tool call without name and arguments")
    if calls and role != "assistant":
        raise BadRow(f"has a tool call, and is the {role}'s")
    name, call_id = (as_text(turn.get(n)) if role == "tool" else "" for n in ("name", "tool_call_id"))
    return Message(role, content, calls=calls, reasoning=reasoning, trained=trained, name=name, call_id=call_id)


def _content(content: Any, role: Role) -> tuple[str, str]:
    """(the text of a turn, the reasoning in front of it)."""
    if isinstance(content, dict):
        if role == "tool":  # what a tool answers is data
            return as_json(content), ""
        raise BadRow(f"has an object for its content, not text: {_short(content)}")
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
            raise BadRow(f"holds more than text: a part of the type {kind!r}")
    return words, thoughts


def _reasoning(turn: dict[str, Any], role: Role) -> str:
    found = {name: turn[name] for name in REASONING if _given(turn.get(name))}
    if not found:
        return ""
    name, text = next(iter(found.items()))
    if role != "assistant":
        raise BadRow(f"has {name!r}, and is the {role}'s: only the assistant thinks in front of its answer")
    if not isinstance(text, str) or any(other != text for other in found.values()):
        raise BadRow(f"has {' and '.join(map(repr, found))}, which are not one text")
    return text


def _trained(turn: dict[str, Any], role: Role) -> bool:
    """Whether the data marks this turn as one to learn."""
    if _given(turn.get("mask")):
        raise BadRow(
            "has 'mask', which some programs mean as `learn this` and others as `leave this out`; say train: false"
        )
    if detail := next((name for name in DETAILS if _given(turn.get(name))), None):
        raise BadRow(f"has {detail!r}: a turn is learned as a whole, or not at all")
    marks = {name: turn[name] for name in MARKS if _given(turn.get(name))}
    for name, value in marks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadRow(f"has {name!r}: {value!r}; allowed are true and false, or 1 and 0")
    if len(set(map(bool, marks.values()))) > 1:
        raise BadRow(f"has {' and '.join(map(repr, marks))}, which contradict each other")
    wanted = bool(next(iter(marks.values()), role == "assistant"))
    if wanted and role != "assistant":
        raise BadRow(f"is to be learned ({next(iter(marks))!r}), and is the {role}'s: only the assistant's turns are")
    return wanted or role != "assistant"


def _calls(value: Any) -> tuple[Call, ...] | None:
    """Calls of tools, one or a list of them, as objects or as JSON text; None where it is something else."""
    if isinstance(value, str):
        try:
            value = parse_json(value, foreign=True)
        except JsonError:
            return None
    calls = [_call(raw) for raw in (value if isinstance(value, list | tuple) else [value])]
    return None if None in calls else tuple(call for call in calls if call is not None)


def _call(value: Any) -> Call | None:
    if not isinstance(value, dict):
        return None
    function = value.get("function") if isinstance(value.get("function"), dict) else value
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = _first(function, "arguments", "parameters")
    if not isinstance(arguments, str):
        arguments = as_json({} if arguments is None else arguments)
    return Call(function["name"], arguments, as_text(value.get("id")))


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
    if not any(m.trained for m in talk if m.role == "assistant"):
        return "marks every answer as one that is not learned: there is nothing to learn"
    return Conversation(tuple(messages), (tools or "").strip())


def _pair(instruction: str, output: str) -> Callable[[Values, Columns], Result]:
    def read(values: Values, c: Columns) -> Result:
        asked, answered = getattr(c, instruction), getattr(c, output)
        _against_its_meaning(values, c, (asked, answered))
        if any(isinstance(values.get(column), list | tuple) for column in (asked, answered)):
            return _prompt_and_completion(values, c, asked, answered)
        about = "" if c.input == asked else cell(values, c.input)
        question, answer = cell(values, asked), cell(values, answered)
        if not answer.strip():
            return f"has an empty {answered!r}"
        if not question.strip() and not about.strip():
            return f"has an empty {asked!r}"
        if mark := _media_in(f"{question}\n{about}"):
            return f"holds {mark}, the place of something that is no text: siliang trains on text alone"
        messages = [Message("user", question, about), Message("assistant", answer)]
        if system := cell(values, c.system).strip():
            messages.insert(0, Message("system", system))
        for before, after in _history(values):  # the oldest first
            messages[-2:-2] = [Message("user", before), Message("assistant", after)]
        return _conversation(messages)

    return read


def _prompt_and_completion(values: Values, c: Columns, asked: str, answered: str) -> Result:
    """TRL's conversations in two columns: the completion is learned, answers in the prompt are not."""
    prompt, completion = values.get(asked), values.get(answered)
    before = [Message("user", as_text(prompt))] if not isinstance(prompt, list | tuple) else _turns(prompt, asked)
    if isinstance(completion, list | tuple):
        after = _turns(completion, answered)
    else:
        after = [Message("assistant", cell(values, answered))]
    if system := cell(values, c.system).strip():
        before.insert(0, Message("system", system))
    if c.input != asked and cell(values, c.input).strip():
        raise BadRow(f"has turns, and a text in {c.input!r} beside them: write it into the turn that it belongs to")
    given = _first(values, c.tools)
    tools = given if isinstance(given, str) or not given else as_json(given)
    return _conversation([*(replace(m, trained=m.role != "assistant") for m in before), *after], tools)


def _history(values: Values) -> list[tuple[str, str]]:
    """LLaMA-Factory's `history`: earlier rounds as [question, answer]."""
    history = values.get("history")
    if isinstance(history, str) and history.strip():
        try:
            history = parse_json(history, foreign=True)
        except JsonError:
            raise BadRow(f"has a 'history' that is no list of [question, answer]: {_short(history)}") from None
    if not _given(history):
        return []
    rounds: list[Any] = list(history) if isinstance(history, list | tuple) else [history]
    if not all(isinstance(h, list | tuple) and len(h) == 2 for h in rounds):
        raise BadRow(f"has a 'history' that is no list of [question, answer]: {_short(history)}")
    return [(as_text(h[0]), as_text(h[1])) for h in rounds]


# ---- the rest ----


def _cell(values: Values, name: str) -> str:
    """A cell that must hold a text.

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
        written = any(isinstance(value, str) for value in (tokens, tags))
        how = ", and holds text: write .jsonl, or a word and its tag a line (.conll)" if written else ""
        return f"must hold lists in {c.tokens!r} and {c.tags!r}{how}"
    if not tokens:
        return f"has an empty {c.tokens!r}"
    if len(tokens) != len(tags):
        return f"has {len(tokens)} tokens and {len(tags)} tags"
    if None in tokens:
        return f"has null in {c.tokens!r}"
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
    return Span(question, context, tuple(map(str, found)), tuple(s for s in starts if isinstance(s, int)))


def misplaced(example: Span) -> str | None:
    """What is wrong with an answer's start; None if nothing is."""
    for text, start in zip(example.answers, example.starts, strict=True):
        if start < 0 or example.context[start : start + len(text)] != text:
            return f"has the answer {shortened(text, 40)!r}, which does not stand at its start ({start})"
    return None


def _source_target(values: Values, c: Columns) -> Result:
    return SourceTarget(_cell(values, c.source), _cell(values, c.target))


LEARNED_MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask")  # TRL's; 1 is learned


def _prepared(values: Values, c: Columns) -> Result:
    ids, labels = values.get("input_ids"), values.get("labels")
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        return "must hold a list of whole numbers in 'input_ids'"
    if labels is not None and not (isinstance(labels, list) and len(labels) == len(ids)):
        return f"must hold a list of {len(ids)} whole numbers in 'labels'"
    labels = labels or []
    if not all(type(i) is int for i in labels):
        return "must hold whole numbers in 'labels'"
    if any(label != IGNORED and label < 0 for label in labels):
        return f"must hold the numbers of tokens, or {IGNORED}, in 'labels'"
    if isinstance(places := values.get("position_ids"), list) and any(b <= a for a, b in pairwise(places)):
        return "has 'position_ids' that begin anew: several texts in one row, which siliang would learn as one"
    for name in LEARNED_MASKS:
        if (learned := values.get(name)) is None:
            continue
        if not isinstance(learned, list) or len(learned) != len(ids) or any(x not in (0, 1) for x in learned):
            return f"must hold a list of {len(ids)} zeros and ones in {name!r}"
        labels = [x if on else IGNORED for x, on in zip(labels or ids, learned, strict=True)]
    mask = values.get("attention_mask")
    if isinstance(mask, list) and len(mask) == len(ids):  # padding is removed
        kept = [i for i, on in enumerate(mask) if on]
        ids, labels = [ids[i] for i in kept], [labels[i] for i in kept] if labels else []
    return Prepared(tuple(ids), tuple(labels))


def _asked(name: LayoutName, instruction: str, output: str) -> Format:
    more = ("system",) if instruction == "input" else ("input", "system")
    read = _pair(instruction, output)
    return Format(name, (instruction, output), read, optional=more, beside=("history", "tools"))


BESIDE_TURNS = ("system", "tools")
PREPARED_TOO = ("labels", "attention_mask", "position_ids", *LEARNED_MASKS)
FORMATS: dict[str, Format] = {
    layout.name: layout
    for layout in (
        Format("prepared", (), _prepared, fixed=("input_ids",), beside=PREPARED_TOO),
        Format("messages", ("messages",), lambda v, c: _messages(v, c, c.messages), optional=BESIDE_TURNS),
        Format(
            "sharegpt",
            (),
            lambda v, c: _messages(v, c, "conversations"),
            fixed=("conversations",),
            optional=BESIDE_TURNS,
        ),
        _asked("alpaca", "instruction", "output"),
        _asked("prompt-completion", "prompt", "completion"),
        _asked("input-output", "input", "output"),
        Format("source-target", ("source", "target"), _source_target),
        Format("sentence-pair", ("text", "text_pair", "label"), _sentence_pair),
        Format("text-label", ("text", "label"), _labelled),
        Format("tokens-tags", ("tokens", "tags"), _tagged),
        Format("squad", ("context", "question", "answers"), _squad),
        Format("text", ("text",), _text),
    )
}
