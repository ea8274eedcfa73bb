"""The predictions of a trained run: classes or tags of texts, answers to questions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from siliang.config import Columns
from siliang.config.embedding import PromptName
from siliang.data.cells import BadRow, as_text, is_blank
from siliang.data.example import Example
from siliang.data.examples import Related, Text
from siliang.data.find_layout import ALIASES, find_layout
from siliang.data.layouts import LAYOUTS
from siliang.data.list_cells import as_list
from siliang.data.reading import DataRow, Reading
from siliang.data.sources import open_source
from siliang.data.task_column import with_task
from siliang.data.text_files import kind_of
from siliang.data.tokens import TokenSet, tokenize
from siliang.engine.splits import mixing
from siliang.language import Bilingual, local, together
from siliang.run_folder import OpenedRun
from siliang.tasks import Prediction, Trained
from siliang.tasks.task import TEXTS_AT_ONCE
from siliang.types import ConfigError, DataError, message_of
from siliang.use.evaluate import engine_of, sums_of
from siliang.use.positions import check_positions

PROMPTS = tuple(name for name in get_args(PromptName) if name != "auto")
PAIR = ("anchor", "positive")  # columns of two texts, of which one may stand alone
MOST_TOKENS = 16_384  # of a batch where the device sets no limit
Input = str | tuple[str, str] | tuple[str, ...] | Example  # a text, a pair of texts, words, or an example


def predict(run: OpenedRun, inputs: Iterable[Any], *, batch_size: int | None = None) -> Iterator[Prediction]:
    """A prediction for each text, in order, of the kind of the run's task: `tasks.seq_cls.PredictedClass`,
    `tasks.token_cls.TaggedWords` or `tasks.question_ans.AnsweredQuestion`.

    Args:
        inputs: Those of the task's own `predict`; read lazily.
        batch_size: Rows that go through the model at once; None: as many as are the fastest.

    Raises:
        ConfigError: The run writes text.
        DataError: A text lacks a part that the task needs, or is longer than the model can read.
    """
    check_predicts(run)
    make = run.task.predict
    assert make is not None

    def read(examples: Iterable[Example]) -> Iterator[tuple[list[Example], TokenSet, dict[int, Any]]]:
        return _read(run, examples, batch_size)

    record = run.record
    of = Trained(
        str(run.folder),
        run.labels,
        record.layout,
        record.columns,
        record.unanswered,
        read,
        run.top,
        run.min_confidence,
    )
    return make(of, inputs)


def predict_tasks(run: OpenedRun, inputs: Sequence[Any], tasks: Sequence[int | None]) -> Iterator[Prediction]:
    """As `predict`, each with the task that it is of; None: the run's `task_id`."""
    found: dict[int, Prediction] = {}
    for task in dict.fromkeys(tasks):
        own = run if task is None else replace(run, task_id=task)
        numbers = [i for i, other in enumerate(tasks) if other == task]
        found |= dict(zip(numbers, predict(own, [inputs[i] for i in numbers]), strict=True))
    return (found[i] for i in range(len(inputs)))


def check_predicts(run: OpenedRun) -> None:
    """
    Raises:
        ConfigError: The run writes text, or an option is not for it.
    """
    check_options(run)
    if run.task.predict is None:
        raise ConfigError(
            Bilingual(
                f"{run.folder} was trained to write text: use `siliang generate`, or --data FILE --output FILE "
                "(generate or predict_file in Python).",
                f"{run.folder} 是生成文本的运行：请用 `siliang generate`，或 --data FILE --output FILE"
                "（Python 中为 generate 或 predict_file）。",
            )
        )


def check_options(run: OpenedRun) -> None:
    """
    Raises:
        ConfigError: An option of predictions is not for this run.
    """
    hooks = run.task.labels
    if run.top < 1:
        raise ConfigError(Bilingual(f"top = {run.top}: must be 1 or more.", f"top = {run.top}：至少为 1。"))
    if run.min_confidence is not None and not 0 <= run.min_confidence <= 1:
        shown, value = _option("min_confidence"), f"{run.min_confidence:g}"
        raise ConfigError(Bilingual(f"{shown} = {value}: must be 0 to 1.", f"{shown.zh} = {value}：应为 0 到 1。"))
    if run.top > 1 and not (hooks and hooks.ranks):
        raise ConfigError(
            Bilingual(
                f"{_option('top')} is for runs of classes or several labels, and {run.folder} is not one: leave it "
                "out.",
                f"{_option('top').zh}用于预测类别或多个标签的运行，而 {run.folder} 不是：请去掉。",
            )
        )
    if run.min_confidence is not None and not (hooks and hooks.abstains):
        raise ConfigError(
            Bilingual(
                f"{_option('min_confidence')} is for runs of one class a text, and {run.folder} is not one: leave it "
                "out.",
                f"{_option('min_confidence').zh}用于每段文本一个类别的运行，而 {run.folder} 不是：请去掉。",
            )
        )
    if run.prompt_name is not None and run.task.with_prompt is None:
        raise ConfigError(
            Bilingual(
                f"{_option('prompt_name')} is for runs that give vectors of texts, and {run.folder} is not one: leave "
                "it out.",
                f"{_option('prompt_name').zh}用于给出文本向量的运行，而 {run.folder} 不是：请去掉。",
            )
        )
    if run.prompt_name is not None and run.prompt_name not in PROMPTS:
        raise ConfigError(
            Bilingual(
                f"{_option('prompt_name')} = {run.prompt_name!r}: must be {', '.join(PROMPTS[:-1])} or {PROMPTS[-1]}.",
                f"{_option('prompt_name').zh} = {run.prompt_name!r}：应为 {'、'.join(PROMPTS)} 之一。",
            )
        )


def _option(name: str) -> Bilingual:
    """An option of predictions, as the command and Python call it."""
    flag = f"--{name.replace('_', '-')}"
    return Bilingual(f"{flag} ({name} in Python)", f"{flag}（Python 中为 {name}）")


def _check_prompt_name(run: OpenedRun, examples: Iterable[Example]) -> None:
    """
    Raises:
        ConfigError: A prompt is chosen for two texts, of which each has its own.
    """
    if run.prompt_name is not None and any(isinstance(example, Related) for example in examples):
        raise ConfigError(
            Bilingual(
                f"{_option('prompt_name')} is for texts that stand alone: of two texts, the first is a query and "
                "the second a document. Leave it out.",
                f"{_option('prompt_name').zh}用于单独的文本：两段文本中第一段是查询，第二段是文档。请去掉。",
            )
        )


def _read(
    run: OpenedRun, examples: Iterable[Example], batch_size: int | None
) -> Iterator[tuple[list[Example], TokenSet, dict[int, Any]]]:
    """(examples, their tokens, the model's output for each entry), some examples at a time."""
    run.check_task()
    task, data = run.task, run.config.data
    columns = data.columns.model_copy(update={"task_id": None})  # all are of the run's task_id
    data = data.model_copy(update={"too_long": "cut", "skip_bad_rows": False, "columns": columns})
    waiting = iter(examples)
    # a run's batches are those of its steps, which are smaller than what is the fastest without gradients
    rows_at_once = batch_size or (run.config.train.batch_size if mixing(run.model) else TEXTS_AT_ONCE)
    with engine_of(run) as engine:
        while some := list(islice(waiting, TEXTS_AT_ONCE)):
            _check_prompt_name(run, some)
            tokens = tokenize(some, run.tokenizer, data, task.data, labels=run.labels, judged=False)
            check_positions(run, tokens, Bilingual("a text", "有文本"))
            yield some, tokens, sums_of(run, engine, tokens, task.read, rows_at_once, tokens_at_once=MOST_TOKENS).found


@dataclass(frozen=True)
class InputRow:
    """A row of a file of data that is to be predicted.

    Attributes:
        values: Its cells, by column.
        input: What the run's task is given; "" where the row has no text.
        task: The task that it is of, from the column of the run's data.columns.task_id; None where the run's `task_id`
            is given, the method has no tasks, or the file has no columns.
    """

    values: dict[str, object]
    input: Input
    task: int | None = None

    @property
    def is_blank(self) -> bool:
        """There is nothing to predict."""
        return isinstance(self.input, str) and is_blank(self.input)


def read_rows(run: OpenedRun, source: str) -> Iterator[InputRow]:
    """The rows of a file of data, one by one, with the texts, pairs or words of the columns that the run was trained
    on.

    Raises:
        DataError: It cannot be read, or lacks the columns.
    """
    data, record, parts = run.config.data, run.record, run.task.inputs
    reading = Reading(data.header, "auto", data.separator, keeps_empty=True)
    layout = LAYOUTS.get(record.layout)
    needed = parts if layout is None else (*layout.needs, *layout.optional)
    names = [record.columns.get(part, part) for part in parts if part in needed]
    of_task = data.columns.task_id if run.tasks is not None and run.task_id is None else None
    if kind_of(Path(source)) == ".txt":
        names, of_task = ["text"], None
    opened = open_source(source, reading)
    layouts = run.task.inputs_layouts
    for row in opened.rows(next(iter(opened.parts)), reading):
        if layouts and row.problem is None:
            yield _read_by_layout(layouts, row, run)
            continue
        needs = names if of_task is None else [*names, of_task]
        missing = [name for name in needs if name not in row.values]
        if row.problem is not None:
            raise DataError(Bilingual(f"{row.where} {row.problem}.", f"{row.where} {local(row.problem, 'zh')}。"))
        if missing:
            there = ", ".join(map(repr, row.values))
            raise DataError(
                together(
                    Bilingual(
                        f"{row.where} has no column {missing[0]!r}, which the run was trained on; it has {there}.",
                        f"{row.where} 没有训练时使用的列 {missing[0]!r}；这里有 {there}。",
                    ),
                    _header_hint(source),
                )
            )
        of = with_task(Text(""), row.values, of_task)
        if isinstance(of, str):
            raise DataError(Bilingual(f"{row.where} {of}.", f"{row.where} {local(of, 'zh')}。"))
        values = [row.values[name] for name in names]
        if "tokens" in parts and isinstance(words := as_list(values[0]), list):
            yield InputRow(row.values, tuple(map(str, words)), of.task)
            continue
        try:
            cells = [as_text(value, name) for value, name in zip(values, names, strict=True)]
        except BadRow as problem:
            raise DataError(
                Bilingual(f"{row.where} {problem}.", f"{row.where} {local(message_of(problem), 'zh')}。")
            ) from None
        blank = any(map(is_blank, cells))  # half a pair is as little as an empty line
        input = "" if blank else (cells[0], cells[1]) if len(cells) > 1 else cells[0]
        yield InputRow(row.values, input, of.task)


def _header_hint(source: str) -> Bilingual:
    """Where the names of the columns come from, in a file that has them in its first line."""
    if kind_of(Path(source)) not in (".csv", ".tsv"):
        return Bilingual("", "")
    return Bilingual(
        " A .csv or .tsv file has the names of its columns in the first line.", ".csv 和 .tsv 文件的第一行应是列名。"
    )


def _only_text(row: DataRow, run: OpenedRun) -> str | None:
    """The column of a text alone, in a row with one of the columns of a pair; None where it has none or both.

    Raises:
        ConfigError: The run has prompts, and the user has not said with which the text stands alone.
    """
    names = [name for part in PAIR for name in (run.record.columns.get(part, part), *ALIASES[part])]
    found = [name for name in dict.fromkeys(names) if name in row.values]
    if len(found) != 1:
        return None
    # the other column may have another name, and the prompt be another one
    if run.prompt_name is None and _has_prompts(run):
        raise ConfigError(
            Bilingual(
                f"{row.where} has {found[0]!r}, one column of a pair. For its vector alone, say the prompt: "
                "--prompt-name query, document or none (prompt_name in Python).",
                f"{row.where} 只有文本对的一列 {found[0]!r}。如果要单独得到它的向量，请指明提示："
                "--prompt-name query、document 或 none（Python 中为 prompt_name）。",
            )
        )
    return found[0]


def _has_prompts(run: OpenedRun) -> bool:
    """Whether texts of the run have a prompt, so that it matters which a text alone has."""
    settings = run.config.embedding
    return settings is not None and bool(settings.query_prompt or settings.document_prompt)


def _no_columns(layouts: Sequence[str], row: DataRow, run: OpenedRun) -> DataError:
    """The error of a row without the columns of any of the layouts."""
    known = run.config.data.columns.model_dump() | dict(run.record.columns)
    sets = [(*layout.fixed, *(known[need] for need in layout.needs)) for layout in map(LAYOUTS.__getitem__, layouts)]
    wanted = ", or ".join(" and ".join(map(repr, names)) for names in sets)
    wanted_zh = "，或 ".join(" 和 ".join(map(repr, names)) for names in sets)
    there = ", ".join(map(repr, row.values))
    return DataError(
        Bilingual(
            f"{row.where} lacks the columns of a row to predict, {wanted}; it has {there}. Rename them.",
            f"{row.where} 没有预测所需的列：{wanted_zh}；它有 {there}。请改列名。",
        )
    )


def _read_by_layout(layouts: tuple[str, ...], row: DataRow, run: OpenedRun) -> InputRow:
    """A row whose example has the kind of another layout than that of the training: of the first that fits."""
    data = run.config.data
    spec = replace(run.task.data, layouts=layouts)
    name = layouts[0] if len(layouts) == 1 else "auto"
    known = {n: c for n, c in run.record.columns.items() if n in Columns.model_fields and c in row.values}
    if {"text", "text_pair"} <= known.keys():  # a pair without its score
        known |= {"anchor": known.pop("text"), "positive": known.pop("text_pair")}
    columns = data.columns.model_copy(update={**known, "task_id": None})
    try:
        layout, columns = find_layout(name, row.values, spec, columns, row.where)
    except DataError:
        if "text" not in layouts or (only := _only_text(row, run)) is None:
            raise _no_columns(layouts, row, run) from None
        layout, columns = LAYOUTS["text"], columns.model_copy(update={"text": only})
    if any(is_blank(row.values[getattr(columns, need)]) for need in layout.needs):
        return InputRow(row.values, "")
    found = layout.example(row.values, columns)
    if isinstance(found, str):
        raise DataError(Bilingual(f"{row.where} {found}.", f"{row.where} {local(found, 'zh')}。"))
    if isinstance(found, Related) and (n := len(found.positives)) > 1:
        raise DataError(
            Bilingual(
                f"{row.where} has {n} texts beside the first: give one in each row.",
                f"{row.where} 的第一段文本对应 {n} 段文本：每行请只给一段。",
            )
        )
    return InputRow(row.values, found)
