"""The table of tasks: whole, asked by no name outside, and open to a task that is not there yet."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from tiny import ENCODER, word_tokenizer
from transformers import BertConfig, BertForSequenceClassification

from siliang.config import DataConfig
from siliang.data.collate import PadCollator
from siliang.data.examples import Labelled
from siliang.data.layouts import LAYOUTS
from siliang.data.prepared import EvalRows
from siliang.data.spec import NUMBERS, TokenColumn
from siliang.data.tokens import tokenize
from siliang.engine.batches import StepCollator
from siliang.engine.evaluate import evaluate, mean_loss, metrics_of
from siliang.engine.step import Engine
from siliang.tasks import TASKS, Task
from siliang.tasks.preferences.rated import RATED
from siliang.tasks.task import EVAL_LOSS
from siliang.types import TASK_HEADS, TRAINED_TASKS, DataError, ModelError, TaskType

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "siliang"

# Who mentions a task by its name outside of tasks/, at most how often, and why. May only shrink.
MENTIONS: dict[str, tuple[int, tuple[str, ...]]] = {
    "the names themselves, and the heads that PEFT trains for each": (8, ("types.py",)),
    # ... and that CPT and aLoRA are for causal LMs alone, as PEFT's configs say
    "PEFT's face, where a config says no more than the task's name: its head, and where a prompt's positions are cut": (
        9,
        ("methods/", "adapters/"),
    ),
    "PEFT's API: a class of models for each task, and what the hub calls it on a card": (16, ("peft_api/",)),
}


def test_who_asks_for_a_task_by_its_name() -> None:
    found = {
        path.relative_to(SOURCE).as_posix(): len(re.findall(r"\bTaskType\.\w", path.read_text(encoding="utf-8")))
        for path in SOURCE.rglob("*.py")
        if path.relative_to(SOURCE).parts[0] != "tasks"
    }
    for why, (most, places) in MENTIONS.items():
        here = [name for name in found if name.startswith(places)]
        assert sum(found.pop(name) for name in here) <= most, why
    assert {name for name, n in found.items() if n} == set()


def test_each_task_is_a_row() -> None:
    assert set(TASKS) == set(TRAINED_TASKS)
    # besides the tasks' own: answers that are good or bad, with preference.loss = kto
    layouts = {layout for task in TASKS.values() for layout in task.data.layouts}
    assert layouts | set(RATED.layouts) == set(LAYOUTS) and not layouts & set(RATED.layouts)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.title)
def test_a_row_is_whole(task: Task) -> None:
    data, model = task.data, task.model
    assert task.title == model.task == task.name.lower()
    assert "input_ids" in data.columns and (data.targets or task.step_loss)
    assert SOURCE / "tasks" in Path(str(sys.modules[data.encoder.__module__].__file__)).parents
    assert hasattr(transformers, model.auto_class)
    assert model.heads == TASK_HEADS.get(task.adapter_type, ())
    assert task.quality is EVAL_LOSS or task.quality in task.metrics
    assert all(task.metric(metric.name) is metric for metric in task.metrics)
    # one loss, one use
    assert task.writes == (task.prompt is not None) == (task.predict is None)
    assert (task.loss is None) == (task.writes or task.step_loss is not None)
    assert task.writes or (
        (task.read or task.step_loss) and task.measure and task.replies and task.inputs and task.blank
    )
    assert task.judged_by != "answers" or task.majority is not None
    row = task.synthetic_row(16, 8)
    sequences = len(row.get("sequences", [16]))
    assert row.keys() <= data.table.keys() and set(data.targets) <= row.keys()
    assert len(row["input_ids"]) == 16 * sequences
    (batch,) = StepCollator(PadCollator(0), task, 2)([dict(row), dict(row)])["batches"]
    assert batch.lengths == (16,) * 2 * sequences and sum(half.weight for half in batch.halves()) == batch.weight
    shown = task.show(row, ["O"])
    assert list(shown.ids) == row["input_ids"][:16]


def test_an_encoder_does_not_learn_to_write() -> None:
    """BERT without is_decoder would see the token that it is to predict."""
    sizes: dict[str, Any] = ENCODER
    with pytest.raises(ModelError, match="reads ahead"):
        Engine(transformers.BertLMHeadModel(BertConfig(**sizes)), TASKS[TaskType.CAUSAL_LM])
    Engine(transformers.BertLMHeadModel(BertConfig(**sizes, is_decoder=True)), TASKS[TaskType.CAUSAL_LM]).close()


# ---- a task that is not there yet ----


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The task of docs/extending.md, as a module; its name is one that no task has taken."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    code, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    path = tmp_path_factory.mktemp("tasks") / "regression.py"
    path.write_text(code.replace("TaskType.REGRESSION", "TaskType.FEATURE_EXTRACTION"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("regression", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["regression"] = module
    spec.loader.exec_module(module)
    return module


def model_of(outputs: int) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = ENCODER
    return BertForSequenceClassification(BertConfig(**(sizes | {"num_labels": outputs}))).eval()


def rows_of(*labels: str) -> list[Labelled]:
    words = ["the film", "a bright story", "was good", "we liked the actor", "not"]
    return [Labelled(text, label) for text, label in zip(words, labels, strict=False)]


def test_labels_that_are_numbers(example: ModuleType) -> None:
    task, data = example.REGRESSION, DataConfig(train="x", max_length=12)
    tokens = tokenize(rows_of("0.5", "-2", "3e0", "1", "0"), word_tokenizer(), data, task.data)
    assert tokens.column("labels").tolist() == [0.5, -2.0, 3.0, 1.0, 0.0] and tokens.learned.tolist() == [1] * 5
    with pytest.raises(DataError, match="'three' where a number belongs"):
        tokenize(rows_of("three"), word_tokenizer(), data, task.data)
    model = model_of(1)
    inputs = [{k: v for k, v in tokens[i].items() if k != "labels"} for i in range(5)]
    with torch.no_grad():
        said = [float(model(**PadCollator(0)([row])).logits) for row in inputs]
    right = tokens.column("labels").tolist()
    for rows_at_once in (1, 2, 5):
        engine = Engine(model, task)
        collator = StepCollator(PadCollator(0), task, rows_at_once, packed=engine.padding is not None)
        sums = evaluate(model, engine, tokens, collator, reader=task.read)
        engine.close()
        assert sums.weight == 5
        assert mean_loss(task, sums, 1) == pytest.approx(
            sum((a - b) ** 2 for a, b in zip(said, right, strict=True)) / 5, rel=1e-4
        )
        found = metrics_of(task, sums, EvalRows(tokens, rows_of(*"00000")))
        assert found["mae"] == pytest.approx(sum(abs(a - b) for a, b in zip(said, right, strict=True)) / 5, rel=1e-4)


def test_labels_that_are_lists(example: ModuleType) -> None:
    """Several classes for a text: each entry weighs one, however long its list is."""

    def loss(output: Any, batch: Any) -> torch.Tensor:
        logits, labels = output.logits.float(), batch.inputs["labels"]
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1).sum()

    columns = {"input_ids": NUMBERS, "labels": TokenColumn(kind="float32", target=True)}
    task = replace(example.REGRESSION, loss=loss, data=replace(example.REGRESSION.data, columns=columns))
    rows = [{"input_ids": [5 + i] * (3 + i), "labels": [0.0, 1.0, float(i % 2)]} for i in range(4)]
    model = model_of(3)
    engine = Engine(model, task)
    (batch,) = StepCollator(PadCollator(0), task, 4, packed=engine.padding is not None)([dict(r) for r in rows])[
        "batches"
    ]
    assert batch.weight == 4 and [half.weight for half in batch.halves()] == [2, 2]
    with torch.no_grad():
        with engine.loss(model, batch) as whole:
            expected = float(whole)
        parts = 0.0
        for half in batch.halves():
            with engine.loss(model, half) as part:
                parts += float(part)
    engine.close()
    assert parts == pytest.approx(expected, rel=1e-5)
