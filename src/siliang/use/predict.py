"""The predictions of a trained run: classes or tags of texts, answers to questions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from siliang.data.cells import BadRow, as_text
from siliang.data.examples import Example
from siliang.data.layouts import LAYOUTS
from siliang.data.reading import Reading
from siliang.data.sources import open_source
from siliang.data.text_files import kind_of
from siliang.data.tokens import TokenSet, tokenize
from siliang.language import Bilingual, local
from siliang.run_folder import OpenedRun
from siliang.tasks import TASKS, Prediction, Trained
from siliang.types import ConfigError, DataError, message_of
from siliang.use.evaluate import engine_of, sums_of
from siliang.use.positions import check_positions

AT_ONCE = 256  # texts that are tokenized together
Asked = str | tuple[str, str] | tuple[str, ...]  # a text, a pair of texts, or words


def predict(run: OpenedRun, asked: Iterable[Any], *, batch_size: int | None = None) -> Iterator[Prediction]:
    """A prediction for each text, in order, of the kind of the run's task: `tasks.seq_cls.PredictedClass`,
    `tasks.token_cls.TaggedWords` or `tasks.question_ans.AnsweredQuestion`.

    Args:
        asked: Inputs of the task's own `predict`; read lazily.
        batch_size: Rows that go through the model at once; None for the run's own.

    Raises:
        ConfigError: The run writes text.
        DataError: A text lacks a part that the task needs, or is longer than the model can read.
    """
    check_predicts(run)
    make = TASKS[run.config.task].predict
    assert make is not None

    def read(examples: Iterable[Example]) -> Iterator[tuple[list[Example], TokenSet, dict[int, Any]]]:
        return _read(run, examples, batch_size)

    record = run.record
    return make(Trained(str(run.folder), run.labels, record.layout, record.columns, record.unanswered, read), asked)


def check_predicts(run: OpenedRun) -> None:
    """
    Raises:
        ConfigError: The run writes text.
    """
    if TASKS[run.config.task].predict is None:
        raise ConfigError(
            Bilingual(
                f"{run.folder} was trained to write text: use `siliang generate`.",
                f"{run.folder} 是生成文本的运行：请用 `siliang generate`。",
            )
        )


def _read(
    run: OpenedRun, examples: Iterable[Example], batch_size: int | None
) -> Iterator[tuple[list[Example], TokenSet, dict[int, Any]]]:
    """(examples, their tokens, the model's output for each entry), some examples at a time."""
    task, data = TASKS[run.config.task], run.config.data.model_copy(update={"too_long": "cut", "skip_bad_rows": False})
    waiting = iter(examples)
    with engine_of(run) as engine:
        while some := list(islice(waiting, AT_ONCE)):
            tokens = tokenize(some, run.tokenizer, data, task.data, labels=run.labels, judged=False)
            check_positions(run, tokens, Bilingual("a text", "有文本"))
            yield some, tokens, sums_of(run, engine, tokens, task.read, batch_size).found


def read_texts(run: OpenedRun, source: str) -> list[Asked]:
    """The texts of a file of data, or the pairs or words, from the columns that the run was trained on; "" where a row
    has none.

    Raises:
        DataError: It cannot be read, or lacks the columns.
    """
    data, record, asks = run.config.data, run.record, TASKS[run.config.task].asks
    reading = Reading(data.header, "auto", data.separator, keeps_empty=True)
    needed = LAYOUTS[record.layout].needs if record.layout else asks
    names = [record.columns.get(part, part) for part in asks if part in needed]
    if kind_of(Path(source)) == ".txt":
        names = ["text"]
    texts: list[Asked] = []
    opened = open_source(source, reading)
    for row in opened.rows(next(iter(opened.parts)), reading):
        missing = [name for name in names if name not in row.values]
        if row.problem is not None:
            raise DataError(Bilingual(f"{row.where} {row.problem}.", f"{row.where} {local(row.problem, 'zh')}。"))
        if missing:
            there = ", ".join(map(repr, row.values))
            raise DataError(
                Bilingual(
                    f"{row.where} has no column {missing[0]!r}, which the run was trained on; it has {there}.",
                    f"{row.where} 没有训练时使用的列 {missing[0]!r}；这里有 {there}。",
                )
            )
        values = [row.values[name] for name in names]
        if "tokens" in asks and isinstance(values[0], list):
            texts.append(tuple(map(str, values[0])))
            continue
        try:
            cells = [as_text(value, name) for value, name in zip(values, names, strict=True)]
        except BadRow as problem:
            raise DataError(
                Bilingual(f"{row.where} {problem}.", f"{row.where} {local(message_of(problem), 'zh')}。")
            ) from None
        texts.append((cells[0], cells[1]) if len(cells) > 1 and any(map(str.strip, cells)) else cells[0])
    return texts
