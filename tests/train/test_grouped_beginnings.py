"""Runs whose steps have rows that begin alike (`train.group_by_beginnings`)."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_same_losses
from every_task import make_models, rated_rows, rows_of
from ranked import train_on, weights_of
from tiny import WORDS, write_jsonl

import siliang
from siliang.config import RunConfig
from siliang.engine.order import Order
from siliang.records import Record
from siliang.tasks.prepare import beginnings_note, prepare_data
from siliang.train.log import Progress
from siliang.train.run import train
from siliang.train.types import Listener
from siliang.types import ConfigError, InterruptedRunError

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
PROMPTS = [" ".join(WORDS[(5 * k + 3 * i) % 23] for i in range(32)) for k in range(3)]
COLUMN = {"causal_lm": "instruction", "seq_cls": "text"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


def configured(models: dict[str, Path], task: str, folder: Path, output: str, **train_settings: Any) -> RunConfig:
    """Four steps of 4 rows, each behind one of three prompts."""
    rows = rated_rows() if task == "kto" else rows_of(task)
    for i, row in enumerate(rows):
        column = COLUMN.get(task, "prompt")
        row[column] = f"{PROMPTS[i % 3]} {row[column]}"
    settings = {"max_steps": 4, "batch_size": 4, "precision": "fp32", "learning_rate": 1e-3, "log_every": 1}
    streamed = train_settings.pop("streaming", False)
    data: dict[str, Any] = {"train": str(write_jsonl(folder / f"{task}.jsonl", rows)), "max_length": 64}
    data |= {"streaming": True, "held_out_rows": 3, "shuffle_buffer": 8} if streamed else {"test_size": 0.2}
    values = {
        "model": str(models["causal_lm"]),
        "task": "preference" if task == "kto" else task,
        "method": {"name": "lora", "r": 4},
        "data": data,
        "train": settings | {"group_by_beginnings": True} | train_settings,
        "preference": {"loss": "kto"} if task == "kto" else None,
        "accept": ["SL042", "SL045"],
        "output": str(folder / output),
    }
    return RunConfig.build(values)


def losses_of(record: Record) -> list[float]:
    return [line.loss for line in record.steps if line.loss is not None]


@pytest.mark.parametrize("task", ["causal_lm", "preference", "reward", "seq_cls"])
def test_a_run_is_a_plain_one_in_the_same_order(
    task: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders: list[list[int]] = []
    iterate = Order.__iter__

    def recorded(order: Order) -> Iterator[int]:
        orders.append(list(iterate(order)))
        return iter(orders[-1])

    monkeypatch.setattr(Order, "__iter__", recorded)
    grouped = train(configured(models, task, tmp_path, "grouped"))
    *_, order = orders
    monkeypatch.setattr(Order, "__iter__", lambda _: iter(order))
    plain = train(
        configured(models, task, tmp_path, "plain", group_by_beginnings=False, share_beginnings=False, packing=False)
    )
    assert sorted(order) == list(range(len(order))) and list(range(len(order))) != order
    assert_same_losses(losses_of(grouped), losses_of(plain))
    assert grouped.final == pytest.approx(plain.final, rel=1e-4, abs=1e-5)
    assert grouped.tokens_trained == plain.tokens_trained


@pytest.mark.parametrize("streaming", [False, True])
def test_stopped_and_resumed(streaming: bool, models: dict[str, Path], tmp_path: Path) -> None:
    def config(output: str) -> RunConfig:
        return configured(models, "causal_lm", tmp_path, output, max_steps=7, streaming=streaming)

    whole = train(config("whole"))
    stopped: list[int] = []

    def stop(progress: Progress) -> None:
        if progress.step == 5 and not stopped:  # in the second epoch, or the third block of the stream
            stopped.append(progress.step)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(InterruptedRunError):
        train(config("run"), Listener(progress=stop))
    assert losses_of(train(config("run"), resume=True)) == losses_of(whole)
    saved = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "run")]
    assert saved[0].read_bytes() == saved[1].read_bytes()


def test_two_ranks_are_as_one(models: dict[str, Path], tmp_path: Path) -> None:
    one = configured(models, "causal_lm", tmp_path, "one")
    record = train(one)
    distributed = one.distributed.model_copy(update={"strategy": "ddp"})
    two = one.model_copy(update={"output": str(tmp_path / "two"), "distributed": distributed})
    endings = train_on(two, 2)
    assert [e.code for e in endings] == [0, 0], endings[0].output
    other = Record.read(tmp_path / "two")
    assert losses_of(other) == pytest.approx(losses_of(record), rel=1e-5)
    found = weights_of(tmp_path / "two")
    for name, value in weights_of(tmp_path / "one").items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5)


def test_what_it_would_save_is_said(models: dict[str, Path], tmp_path: Path) -> None:
    """Random steps of 4 rows have most of the three prompts; steps of rows that begin alike have one or two."""
    config = configured(models, "causal_lm", tmp_path, "run", group_by_beginnings=False)
    values = config.model_dump(mode="json")
    notes = siliang.check(values).counts["notes"]
    assert isinstance(notes, list) and len(notes) == 1
    line = str(notes[0])
    assert "of the tokens are beginnings that several rows have" in line and "group_by_beginnings=true" in line
    planned = siliang.plan(values, memory="8GB")
    assert [note for note in planned.methods[0].notes if "group_by_beginnings" in note] == [line]
    apart = {"share_beginnings": False}, {"group_by_beginnings": True}, {"neftune_alpha": 5.0}, {"packing": False}
    for changed in apart:
        values["train"] = config.train.model_dump(mode="json") | changed
        assert siliang.check(values).counts["notes"] == []
        assert not any("fewer" in note for note in siliang.plan(values, memory="8GB").methods[0].notes)


def test_where_labels_depend_on_the_beginning(models: dict[str, Path], tmp_path: Path) -> None:
    """It is not proposed, and a run with it says what it does."""
    beginnings = [" ".join(WORDS[i : i + 20]) for i in (0, 20)]
    rows = [{"text": f"{beginnings[i % 2]} {WORDS[i % 40]} {WORDS[i % 37]}", "label": i % 2} for i in range(400)]
    values: dict[str, Any] = configured(models, "seq_cls", tmp_path, "labels").model_dump(mode="json")
    values["data"] |= {"train": str(write_jsonl(tmp_path / "labels.jsonl", rows)), "eval": None, "max_length": 64}
    values["train"] |= {"batch_size": 8, "max_steps": 1, "group_by_beginnings": False}
    for proposed in (True, False):  # with labels that do not depend on the beginning, and with these
        own = [row | {"label": i // 2 % 2} if proposed else row for i, row in enumerate(rows)]
        write_jsonl(tmp_path / "labels.jsonl", own)
        config = RunConfig.build(values)
        assert (beginnings_note(config, prepare_data(config)) is not None) == proposed
    values["train"]["group_by_beginnings"] = True
    said: list[str] = []
    train(RunConfig.build(values), Listener(say=said.append))
    assert any("with rows that begin alike in a step, labels vary" in line for line in said), said


def test_kto_compares_the_rows_of_a_step(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compares the rows of a step with each other"):
        train(configured(models, "kto", tmp_path, "kto"))


def test_where_it_saves_nothing_a_line_says_so(models: dict[str, Path], tmp_path: Path) -> None:
    said: list[str] = []
    config = configured(models, "causal_lm", tmp_path, "apart", max_steps=1, share_beginnings=False)
    train(config, Listener(say=said.append))
    assert any("group_by_beginnings saves nothing: training computes each row by itself" in line for line in said)
    said.clear()
    rows = [{"instruction": f"{WORDS[i]} {WORDS[2 * i]}", "output": WORDS[i]} for i in range(10)]
    data = config.data.model_copy(update={"train": str(write_jsonl(tmp_path / "apart.jsonl", rows))})
    config = configured(models, "causal_lm", tmp_path, "little", max_steps=1)
    train(config.model_copy(update={"data": data}), Listener(say=said.append))
    assert any("group_by_beginnings has no effect" in line for line in said)


def test_rows_that_are_compared_with_each_other_are_not_grouped(models: dict[str, Path], tmp_path: Path) -> None:
    config = configured(models, "causal_lm", tmp_path, "run")
    rows = write_jsonl(tmp_path / "pairs.jsonl", rows_of("embedding"))
    values = config.model_dump(mode="json") | {"task": "embedding", "model": str(models["embedding"])}
    values["data"] = {"train": str(rows), "max_length": 24}
    with pytest.raises(ConfigError, match="embedding compares the rows of a step with each other"):
        siliang.check(values)
    assert siliang.check(values | {"embedding": {"loss": "triplet", "pooling": "mean"}}).counts["rows"]
