"""The rows of a file that a run which writes text is to answer: conversations without their last answer, or texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from siliang.config import Columns
from siliang.data.cells import BadRow
from siliang.data.examples import Conversation, Message, SourceTarget, Text
from siliang.data.find_layout import find_layout
from siliang.data.layouts import LAYOUTS
from siliang.data.reading import DataRow, Reading
from siliang.data.sources import open_source
from siliang.data.text_files import kind_of
from siliang.data.turns import listed
from siliang.language import Bilingual, local
from siliang.run_folder import OpenedRun
from siliang.types import DataError, message_of

ANSWERS = ("output", "completion", "target", "chosen", "rejected")  # columns that the file need not have
ANSWER = "-"  # in place of an answer that is not there


@dataclass(frozen=True)
class AskedRow:
    """A row of a file.

    Attributes:
        values: Its cells, by column.
        asked: What the run is asked; None for a row without text.
    """

    values: dict[str, object]
    asked: Conversation | Text | None


def read_asked(run: OpenedRun, source: str, system: str = "") -> Iterator[AskedRow]:
    """The rows of a file, one by one, as the run was trained on them; an answer that a row has is not given away.

    Args:
        system: A system message for conversations that have none.

    Raises:
        DataError: The file cannot be read, or lacks the columns.
    """
    data = run.config.data
    reading = Reading(data.header, "auto", data.separator, keeps_empty=True)
    opened = open_source(source, reading)
    plain = run.record.of_texts
    is_lines = kind_of(Path(source)) == ".txt"
    for row in opened.rows(next(iter(opened.parts)), reading):
        if row.problem is not None:
            raise DataError(Bilingual(f"{row.where} {row.problem}.", f"{row.where} {local(row.problem, 'zh')}。"))
        if is_lines:
            text = str(row.values.get("text", ""))
            asked = Text(text) if plain else Conversation((Message("user", text),))
            found: Conversation | Text | None = asked if text.strip() else None
        else:
            found = _asked(run, row)
        if system and isinstance(found, Conversation) and found.messages[0].role != "system":
            found = replace(found, messages=(Message("system", system), *found.messages))
        yield AskedRow(row.values, found)


def _asked(run: OpenedRun, row: DataRow) -> Conversation | Text | None:
    spec, columns = run.task.data, run.config.data.columns.model_copy(update={"task_id": None})
    values = dict(row.values)
    for name in ANSWERS:
        column = str(run.record.columns.get(name, getattr(columns, name)))
        if name in run.record.columns or column in values:
            values[column] = ANSWER
    for name in (run.record.columns.get("messages", columns.messages), "conversations"):
        if name in values and isinstance(turns := listed(values[name]), list):
            values[name] = _answered(turns)
    known = {n: c for n, c in run.record.columns.items() if n in Columns.model_fields}
    columns = columns.model_copy(update=known)
    layouts = [name for name in run.record.layouts if name in LAYOUTS]
    name = layouts[0] if len(layouts) == 1 else "auto"
    layout, columns = find_layout(name, values, spec, columns, row.where)
    cells = [str(values.get(getattr(columns, need), "")).strip() for need in layout.needs]
    if layout.needs and all(cell in ("", ANSWER) for cell in cells):
        return None
    try:
        found = layout.example(values, columns)
    except BadRow as problem:
        raise DataError(
            Bilingual(f"{row.where} {problem}.", f"{row.where} {local(message_of(problem), 'zh')}。")
        ) from None
    if isinstance(found, str):
        raise DataError(Bilingual(f"{row.where} {found}.", f"{row.where} {local(found, 'zh')}。"))
    if isinstance(found, SourceTarget):
        return Conversation((Message("user", found.source),))
    if isinstance(found, Conversation):
        messages = list(found.messages)
        while messages and messages[-1].role == "assistant":
            messages.pop()
        return replace(found, messages=tuple(messages))
    if isinstance(found, Text):
        return found
    raise DataError(
        Bilingual(
            f"{row.where} is not a question, a conversation or a text that a run can answer.",
            f"{row.where} 不是运行可以回答的问题、对话或文本。",
        )
    )


def _answered(turns: list[object]) -> list[object]:
    """Turns that end with an answer, as those of training do."""
    last = turns[-1] if turns else None
    if isinstance(last, dict):
        key, text = ("from", "value") if "from" in last else ("role", "content")
        role = str(last.get(key, "")).lower()
        if role not in ("assistant", "gpt", "chatgpt", "bot", "model"):
            return [*turns, {key: "gpt" if key == "from" else "assistant", text: ANSWER}]
    return turns
