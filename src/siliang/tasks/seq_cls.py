"""A class for a text, or for a pair of texts; or several labels, a class of an order, or a number.

Which of them a label is, `classification.problem` says, or the labels themselves do. `labels/` has the losses, the
metrics and the predictions of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from siliang.config import ClassificationConfig, DataConfig, Problem, RunConfig
from siliang.data import label_cells
from siliang.data.entries import Rows, dropped
from siliang.data.examples import Labelled, SeveralLabels
from siliang.data.numbers import as_number, with_point
from siliang.data.pairs import coded_texts
from siliang.data.spec import LABEL, NUMBERS, DataSpec, Encode, TokenColumn
from siliang.language import Bilingual
from siliang.models.spec import ModelSpec
from siliang.models.tokenizer import Tokenizer
from siliang.records import Classification
from siliang.tasks.labels.numbers import as_number_of_text
from siliang.tasks.labels.one_label import as_one_label, verdict
from siliang.tasks.labels.problems import settle
from siliang.tasks.labels.several_labels import as_several_labels, in_line
from siliang.tasks.metrics import ACCURACY
from siliang.tasks.task import Shown, Task
from siliang.types import TASK_HEADS, TaskType

FLOAT, FLOATS = TokenColumn(many=False, kind="float32", target=True), TokenColumn(kind="float32", target=True)

# ---- tokens ----


def encoder(tokenizer: Tokenizer, data: DataConfig, labels: list[str]) -> Encode:
    """Makes the function that turns examples into entries: with labels, which have names, or with numbers."""
    return partial(encode, tokenizer, data, labels)


def encode(
    tokenizer: Tokenizer, data: DataConfig, labels: list[str], examples: Sequence[Labelled | SeveralLabels]
) -> list[Rows]:
    """Texts, or pairs of texts, with the number of their class, with 0 or 1 for each label, or with their number; a
    label that is empty is not known yet."""
    numbers = {name: i for i, name in enumerate(labels)}
    texts, pairs = [e.text for e in examples], [e.pair for e in examples]
    rows: list[Rows] = []
    for example, coded in zip(examples, coded_texts(tokenizer, texts, pairs, data.max_length), strict=True):
        target = _target(example, numbers)
        if coded.lost and data.too_long == "drop":
            rows.append(dropped(labels=target))
            continue
        rows.append([{"input_ids": coded.ids, "token_type_ids": coded.types, "labels": target, "lost": coded.lost}])
    return rows


def _target(example: Labelled | SeveralLabels, numbers: Mapping[str, int]) -> float | list[int]:
    if isinstance(example, SeveralLabels):
        return [int(name in example.labels) for name in numbers]
    if example.label in numbers or not example.label:
        return numbers.get(example.label, 0)
    number = as_number(with_point(example.label))
    assert number is not None and not numbers, "reading refuses it"
    return number


def synthetic_row(length: int, target_length: int) -> dict[str, Any]:
    """An entry of so many tokens."""
    return {"input_ids": [1] * length, "labels": 0}


def synthetic_labels(length: int, target_length: int) -> dict[str, Any]:
    """The same for several labels: one value, for all of them."""
    return {"input_ids": [1] * length, "labels": [0.0]}


def show(row: Mapping[str, Any], labels: list[str]) -> Shown:
    """The tokens, and the class, the labels or the number beneath."""
    target = row["labels"]
    if isinstance(target, list):
        return Shown(row["input_ids"], target=in_line(n for n, on in zip(labels, target, strict=False) if on))
    return Shown(row["input_ids"], target=labels[target] if labels else f"{target:g}")


# ---- by the problem ----

As = Callable[[Task, ClassificationConfig, Classification | None], Task]
PROBLEMS: dict[Problem, As] = {
    "one_label": as_one_label,
    "several_labels": as_several_labels,
    "number": as_number_of_text,
    "ordered": as_one_label,
}


def with_settings(task: Task, config: RunConfig, learned: Classification | None) -> Task:
    """The task of a run's labels. Where they are not known yet, each row has one."""
    settings = config.classification or ClassificationConfig()
    problem: Problem = "one_label" if settings.problem == "auto" else settings.problem
    return PROBLEMS[problem](_with_columns(task, problem, settings.label_separator), settings, learned)


def _with_columns(task: Task, problem: Problem, separator: str | None) -> Task:
    """The task with the data and the head of these labels. problem_type is transformers' name, by which it takes the
    model's loss and its pipeline the function over the logits."""
    data, model = task.data, task.model
    match problem:
        case "several_labels":
            mark = None if separator == "auto" else separator
            data = replace(
                data,
                columns={**data.columns, "labels": FLOATS},
                read_label=partial(label_cells.several_labels, separator=mark),
                several=True,
            )
            model = replace(model, problem_type="multi_label_classification")
            return replace(task, data=data, model=model, synthetic_row=synthetic_labels)
        case "number":
            data = replace(data, columns={**data.columns, "labels": FLOAT}, read_label=label_cells.a_number, named=None)
            return replace(task, data=data, model=replace(model, outputs=1, problem_type="regression"))
        case "ordered":
            return replace(task, data=replace(data, ordered=True))
        case "one_label":
            return task


_WITHOUT_LABELS = Task(
    name=TaskType.SEQ_CLS,
    adapter_type=TaskType.SEQ_CLS,
    data=DataSpec(
        name="seq_cls",
        layouts=("sentence-pair", "text-label"),
        columns={"input_ids": NUMBERS, "token_type_ids": NUMBERS, "labels": LABEL},
        encoder=encoder,
        named="label",
        one_layout=True,
    ),
    model=ModelSpec(
        task="seq_cls",
        auto_class="AutoModelForSequenceClassification",
        heads=TASK_HEADS[TaskType.SEQ_CLS],
        problem_type="single_label_classification",
        needs_padding_token=True,
    ),
    legend=(
        Bilingual("grey: read, green: the label, which is learned", "灰色：输入，绿色：要学习的标签"),
        Bilingual("->: the label, which is learned", "->：要学习的标签"),
    ),
    show=show,
    synthetic_row=synthetic_row,
    with_settings=with_settings,
    settle=settle,
    counts_rows=True,
    quality=ACCURACY,
    verdict=verdict,
    inputs=("text", "text_pair"),
    example_prompt="a text",
)
SEQ_CLS = as_one_label(_WITHOUT_LABELS, ClassificationConfig(problem="one_label"), None)
