"""The rows of a file that a run which writes text is to answer: conversations without their last answer, or texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from siliang.config import Columns
from siliang.data.cells import BadRow, is_blank
from siliang.data.examples import SourceTarget, Text
from siliang.data.find_layout import find_layout
from siliang.data.layouts import LAYOUTS
from siliang.data.list_cells import as_list
from siliang.data.messages import Conversation, Message, Ranked, Rated
from siliang.data.reading import DataRow, Reading
from siliang.data.refused import PREFERENCES, WANTED
from siliang.data.sources import open_source
from siliang.data.text_files import kind_of
from siliang.language import Bilingual, local
from siliang.run_folder import OpenedRun
from siliang.secrets import short_repr
from siliang.types import ConfigError, DataError, message_of

ANSWERS = ("output", "completion", "target")  # columns that the file need not have
JUDGED = ("chosen", "rejected", "responses", "scores", "label")  # answers to choose from, and how good they are
ANSWER = "-"  # in place of an answer that is not there


@dataclass(frozen=True)
class AskedRow:
    """A row of a file.

    Attributes:
        values: Its cells, by column.
        asked: What the run is asked; None for a row without text.
        where: Its place, for messages.
    """

    values: dict[str, object]
    asked: Conversation | Text | None
    where: str


def read_asked(run: OpenedRun, source: str, system: str = "") -> Iterator[AskedRow]:
    """The rows of a file, one by one, as the run was trained on them; an answer that a row has is not given away.

    Args:
        system: A system message for conversations that have none; white space around it is removed.

    Raises:
        DataError: The file cannot be read, or lacks the columns.
        ConfigError: The rows are texts without a template, and there is a system message.
    """
    data, system = run.config.data, system.strip()
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
            found: Conversation | Text | None = None if is_blank(text) else asked
        else:
            found = _asked(run, row)
        if system and isinstance(found, Text):
            raise ConfigError(
                Bilingual(
                    f"system = {short_repr(system)}: {row.where} is a text that is continued without a template, where "
                    "a system message has no place: leave it out.",
                    f"system = {short_repr(system)}：{row.where} 是不用模板直接续写的文本，没有系统消息的位置："
                    "请去掉。",
                )
            )
        if system and isinstance(found, Conversation) and found.messages[0].role != "system":
            found = replace(found, messages=(Message("system", system), *found.messages))
        yield AskedRow(row.values, found, row.where)


def _asked(run: OpenedRun, row: DataRow) -> Conversation | Text | None:
    spec, read_by = run.task.data, run.task.inputs_layouts
    known = {n: c for n, c in run.record.columns.items() if n in Columns.model_fields}
    columns = run.config.data.columns.model_copy(update={**known, "task_id": None})
    values = dict(row.values)
    layouts = [name for name in run.record.layouts if name in LAYOUTS]
    if read_by:
        if (question := _question(layouts, values, columns)) is not None:
            return question
        spec, layouts = replace(spec, layouts=read_by), list(read_by)
        judged = {*(getattr(columns, name) for name in JUDGED), *PREFERENCES, *WANTED}
        values = {name: value for name, value in row.values.items() if name not in judged}
    for name in ANSWERS:
        column = str(getattr(columns, name))
        if read_by or name in known or column in values:
            values[column] = ANSWER
    for name in (columns.messages, "conversations"):
        if name in values and isinstance(turns := as_list(values[name]), list):
            values[name] = _answered(turns)
    name = layouts[0] if len(layouts) == 1 else "auto"
    try:
        layout, columns = find_layout(name, values, spec, columns, row.where)
    except DataError:
        if not read_by:
            raise _no_question(row, _question_columns(layouts, columns)) from None
        answers = [value for name, value in row.values.items() if name not in values]
        if answers and all(map(is_blank, answers)):
            return None
        names = (columns.prompt, columns.instruction, columns.messages, "conversations")
        raise _no_question(row, names) from None
    cells = [values.get(name) for name in (*layout.fixed, *(getattr(columns, need) for need in layout.needs))]
    if all(cell == ANSWER or is_blank(cell) for cell in cells):
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


def _question(layouts: Sequence[str], values: dict[str, object], columns: Columns) -> Conversation | None:
    """What is asked in a row that has its answers, as in training; None where it is not such a row."""
    for layout in map(LAYOUTS.__getitem__, layouts):
        if all(name in values for name in (*layout.fixed, *(getattr(columns, need) for need in layout.needs))):
            found = layout.example(values, columns)
            if isinstance(found, Ranked | Rated):
                return Conversation(found.prompt_messages, found.tools)
    return None


def _question_columns(layouts: Sequence[str], columns: Columns) -> list[str]:
    """The columns of the layouts that hold what is asked."""
    return list(
        dict.fromkeys(
            name
            for layout in map(LAYOUTS.__getitem__, layouts)
            for name in (*layout.fixed, *(getattr(columns, need) for need in layout.needs if need not in ANSWERS))
        )
    )


def _no_question(row: DataRow, names: Sequence[str]) -> DataError:
    there, wanted = ", ".join(map(repr, row.values)), ", ".join(map(repr, names))
    return DataError(
        Bilingual(
            f"{row.where} has no question, which is in a column {wanted}; it has {there}. Rename its column.",
            f"{row.where} 没有提问，提问应在名为 {wanted} 的列中；它有 {there}。请改列名。",
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
