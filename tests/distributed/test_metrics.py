"""The metrics of held-out rows are those of one process, whatever the number of ranks that share them."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from every_task import TASKS, configured, make_models, rated_rows
from ranked import changed, train_on
from tiny import write_jsonl

from faults.runs import run
from siliang.config import RunConfig
from siliang.records import Record

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked, which this system cannot")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def one(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunConfig]:
    """A task's run on one rank, which is made once."""

    @cache
    def train_alone(task: str) -> RunConfig:
        folder = tmp_path_factory.mktemp(task)
        config = configured(task, models, folder, max_steps=1, batch_size=11, learning_rate=1e-5)
        assert run(config).code == 0
        return config

    return train_alone


WAYS = [(task, 2, "ddp") for task in TASKS] + [("seq_cls", 2, "fsdp"), ("causal_lm", 2, "fsdp")]
# without the other tasks under FSDP2: their logits are views, of which it warns
MORE = [pytest.param(task, 4, "ddp", marks=pytest.mark.long) for task in TASKS]


@pytest.mark.parametrize(("task", "size", "strategy"), [*WAYS, *MORE])
def test_metrics_on_several_ranks(
    task: str, size: int, strategy: str, one: Callable[[str], RunConfig], tmp_path: Path
) -> None:
    """12 held-out rows of unlike length in steps of 11: the last step has fewer rows than there are ranks."""
    config = one(task)
    expected = Record.read(Path(config.output)).final
    endings = train_on(changed(config, tmp_path / "run", strategy), size)
    assert [e.code for e in endings] == [0] * size, endings[0].output + endings[-1].output
    found = Record.read(tmp_path / "run").final
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        rounded = name.endswith(("loss", "perplexity", "per_byte", "margin", "reward", "mse", "mae", "r2"))
        close = pytest.approx(value, rel=1e-4, abs=1e-6) if rounded else pytest.approx(value, rel=1e-12)
        assert found[name] == close, name


def test_answers_of_one_kind_on_several_ranks(models: dict[str, Path], tmp_path: Path) -> None:
    """No rank makes up a figure of the kind that is not there."""
    config = configured("kto", models, tmp_path, max_steps=1, batch_size=11, learning_rate=1e-5)
    bad = [row for row in rated_rows() if not row["label"]]
    config.data.eval = str(write_jsonl(tmp_path / "bad.jsonl", bad))
    assert run(config).code == 0
    assert [e.code for e in train_on(changed(config, tmp_path / "two", "ddp"), 2)] == [0, 0]
    expected, found = Record.read(Path(config.output)).final, Record.read(tmp_path / "two").final
    assert found.keys() == expected.keys() and not {"margin", "chosen_reward"} & found.keys()
    assert found["rejected_reward"] == pytest.approx(expected["rejected_reward"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("task", "strategies"), [("causal_lm", ("ddp", "fsdp")), ("seq_2_seq_lm", ("ddp", "fsdp"))])
def test_each_rank_writes_its_share_of_the_texts(
    task: str, strategies: tuple[str, ...], models: dict[str, Path], tmp_path: Path
) -> None:
    """A model that writes words: 3 batches of texts, of which one rank has two."""
    before = configured(task, models, tmp_path, "full", max_steps=30, learning_rate=2e-2)
    assert run(before).code == 0
    config = configured(task, {task: tmp_path / "run" / "model"}, tmp_path, max_steps=1, learning_rate=1e-5)
    values = config.model_dump(mode="json")
    values["evaluation"] = {"measures": ["rouge_l", "chrf", "exact_match"], "rows": 11}
    config = RunConfig.build(values | {"output": str(tmp_path / "one")})
    assert run(config).code == 0
    expected = Record.read(tmp_path / "one")
    measured = {name: expected.final[name] for name in expected.signatures}
    assert measured.keys() == {"rouge_l", "chrf", "exact_match"} and 0 < measured["chrf"] < 100
    for strategy in strategies:
        endings = train_on(changed(config, tmp_path / strategy, strategy), 2)
        assert [e.code for e in endings] == [0, 0], endings[0].output + endings[-1].output
        found = Record.read(tmp_path / strategy).final
        assert {name: found[name] for name in measured} == measured, strategy


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_each_rank_takes_its_share_of_the_reference(strategy: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Full tuning of preferences: rows change their rank in the second epoch. The last step of an epoch has a single
    row, of which the other rank runs a dummy."""
    config = configured("preference", models, tmp_path, "full", max_steps=6, batch_size=5, log_every=1)
    assert run(config).code == 0
    endings = train_on(changed(config, tmp_path / "two", strategy), 2)
    assert [e.code for e in endings] == [0, 0], endings[0].output + endings[1].output
    expected, found = Record.read(Path(config.output)), Record.read(tmp_path / "two")
    losses = [[line.loss for line in record.steps if line.loss is not None] for record in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 6
    assert found.final == pytest.approx(expected.final, rel=1e-4, abs=1e-5)
