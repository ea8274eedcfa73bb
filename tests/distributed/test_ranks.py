"""The same global batch and seed on one rank and on several: the same losses, the same adapter."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranked import ARGUMENTS, assert_same, changed, configured, killed, start, stopped, train_on

from faults.runs import Place, make_place, run
from siliang.config import MethodConfig, RunConfig
from siliang.distributed.sharding import fake_mesh
from siliang.engine.order import Order, shared_steps, shares
from siliang.engine.step import Engine
from siliang.plan import plan, target_device
from siliang.plan.preflight import Planner
from siliang.records import Record
from siliang.train.loop import Training
from siliang.train.saving import checkpoints, read_state

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked, which this system cannot")


@pytest.fixture(scope="module")
def alone(still_place: Place, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    """Trains on one rank, what was asked for before not again."""

    @cache
    def train_alone(method: str = "lora", **train: float) -> RunConfig:
        config = configured(still_place, tmp_path_factory.mktemp("one") / "run", method, **train)
        assert run(config).code == 0
        return config

    return train_alone


WAYS = [(method, strategy, size) for method in ARGUMENTS for strategy in ("ddp", "fsdp") for size in (2, 4)]
# in `make test` each method on two ranks, each strategy on two and on four; all of them in `make test-long`
SHORT = {(method, "ddp", 2) for method in ARGUMENTS} | {
    ("lora", "ddp", 4),
    ("lora", "fsdp", 2),
    ("qlora", "fsdp", 2),
    ("full", "fsdp", 4),
}


@pytest.mark.parametrize(
    ("method", "strategy", "size"), [w if w in SHORT else pytest.param(*w, marks=pytest.mark.long) for w in WAYS]
)
def test_as_one(method: str, strategy: str, size: int, alone: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A step has 4 rows of unlike length, the last of an epoch fewer than ranks. LoRA's labels are smoothed."""
    one = alone(method, tokens_at_once=16, label_smoothing=0.1 if method == "lora" else 0.0)
    endings = train_on(changed(one, tmp_path / "several", strategy), size)
    assert [e.code for e in endings] == [0] * size, endings[0].output + endings[-1].output
    assert_same(Path(one.output), tmp_path / "several")
    assert len(Record.read(tmp_path / "several").memory.peak_bytes_by_rank) == size
    assert endings[0].output.count("data  ") == 1 and all("data  " not in e.output for e in endings[1:])


@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        ("lora", "ddp"),
        ("full", "fsdp"),
        pytest.param("lora", "fsdp", marks=pytest.mark.long),
        pytest.param("full", "ddp", marks=pytest.mark.long),
    ],
)
def test_saved_on_two_goes_on_with_one_and_with_four(
    method: str, strategy: str, alone: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Stopped by a signal to one rank alone, which stops all in the same step."""
    one = alone(method)
    stopped(changed(one, tmp_path / "then-1", strategy))
    shutil.copytree(tmp_path / "then-1", tmp_path / "then-4")
    for size in (1, 4):
        folder = tmp_path / f"then-{size}"
        two = changed(one, folder, strategy)
        endings = [run(two, resume=True)] if size == 1 else train_on(two, size, resume=True)
        assert [e.code for e in endings] == [0] * size, endings[0].output
        assert_same(Path(one.output), folder)


def test_ranks_drop_out_on_their_own(tmp_path: Path) -> None:
    config = configured(make_place(tmp_path, dropout=0.1), tmp_path / "run", max_steps=4, save_every=2)
    endings = train_on(changed(config, tmp_path / "run"), 2)
    assert [e.code for e in endings] == [0, 0], endings[0].output
    kept = checkpoints(tmp_path / "run" / "checkpoints")
    first, second = (state["torch"] for state in read_state(kept[max(kept)])["random"])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_that_is_killed(strategy: str, still_place: Place, tmp_path: Path) -> None:
    """The other one reports it and ends; the checkpoint is complete, and training resumes from it."""
    config = configured(still_place, tmp_path / "one", save_every=3)
    assert run(config).code == 0
    two = changed(config, tmp_path / "two", strategy)
    said = killed(two)
    assert f"siliang train --resume {tmp_path / 'two'}" in said and "Traceback" not in said
    assert 6 <= max(checkpoints(tmp_path / "two" / "checkpoints")) <= 9
    endings = train_on(two, 2, resume=True)
    assert [e.code for e in endings] == [0, 0], endings[0].output
    assert_same(tmp_path / "one", tmp_path / "two")


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 9))
def test_shares_are_all_of_a_step_and_balanced(lengths: list[int], ranks: int) -> None:
    found = shares(lengths, range(len(lengths)), ranks)
    assert sorted(i for share in found for i in share) == list(range(len(lengths)))
    tokens = [sum(lengths[i] for i in share) for share in found]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_a_rank_without_a_row_gets_one_that_does_not_count() -> None:
    lengths = [3, 4, 5, 6, 7]
    steps = list(shared_steps(Order(lengths, step=4, seed=0, by_length=False), lengths, 4, 4))
    assert [len(shares) for shares in steps] == [4, 4]
    last = [rows[0] for rows in steps[1]]
    assert [i < 0 for i in last] == [False, True, True, True] and {~i for i in last[1:]} == {last[0]}


def test_what_is_too_large_for_one_is_sharded(still_place: Place, tmp_path: Path) -> None:
    """Between what a whole model takes and what a share does: one device is too small, on two auto takes FSDP."""
    config = configured(still_place, tmp_path / "run", "full", max_steps=2)
    alone = config.model_copy(update={"train": config.train.model_copy(update={"memory_budget": None})})
    target = replace(target_device(config), process_bytes=0, work_bytes=0)
    with fake_mesh(2) as mesh:
        whole, share = (
            plan(alone.with_strategy(strategy), target, mesh=mesh, timed=False).methods[0].needed_bytes
            for strategy in ("ddp", "fsdp")
        )
    assert share < whole
    planner = Planner(replace(target, memory_bytes=(share + whole) // 2, memory_source="as asked"))
    assert run(alone, planner=planner).code == 2
    endings = [child.end() for child in start(changed(alone, tmp_path / "run", "auto"), 2, planner=planner)]
    assert [e.code for e in endings] == [0, 0], endings[0].output
    assert "on each device, weights sharded (fsdp)" in endings[0].output
    record = Record.read(tmp_path / "run")
    assert record.config["distributed"]["strategy"] == "fsdp"
    assert record.memory.predicted_bytes == share


def test_only_what_is_trained_is_sent(still_place: Place, tmp_path: Path) -> None:
    """DDP's own count of what it sends in a step, which is what it sent at the start, too."""
    config = configured(still_place, tmp_path / "run", max_steps=2)

    def counting() -> None:
        after_step = Training._after_step

        def counted(self: Training, *args: Any, **kwargs: Any) -> None:
            model: Any = self.model
            trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
            told = model._get_ddp_logging_data()
            assert told["total_parameter_size_bytes"] == trained == sum(map(int, told["bucket_sizes"].split(", ")))
            assert trained < 0.1 * sum(p.nbytes for p in model.parameters())
            after_step(self, *args, **kwargs)

        Training._after_step = counted  # type: ignore[method-assign]

    endings = [child.end() for child in start(config, 2, before=counting)]
    assert [e.code for e in endings] == [0, 0], endings[0].output


def out_of_memory_on_the_second() -> None:
    """In its second step, the first time that it is tried."""
    whole, calls = Engine.run, [0]

    def short(self: Engine, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls[0] += os.environ["RANK"] == "1"
        if calls[0] == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return whole(self, *args, **kwargs)

    Engine.run = short  # type: ignore[method-assign]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_memory_that_one_rank_lacks_ends_the_run_on_all(strategy: str, still_place: Place, tmp_path: Path) -> None:
    """`train.fit` would begin the step again on that rank alone, while the other waits in the middle of it."""
    config = changed(configured(still_place, tmp_path / "run", fit=True, max_steps=4), tmp_path / "run", strategy)
    first, second = (child.end() for child in start(config, 2, before=out_of_memory_on_the_second))
    assert second.code == 2 and "Step 2 does not fit the memory" in second.output
    assert "train.batch_size=" in second.output and "train.fit" not in second.output
    assert first.code == 2 and "has lost another rank" in first.output, first.output


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_an_initialization_from_data_on_ranks(init: str, still_place: Place, tmp_path: Path) -> None:
    """One rank learns it, and the others have the same; under fsdp it is refused in one line."""
    own: dict[str, Any] = {"eva_config": {"use_label_mask": False}} if init == "eva" else {}  # few tokens are learned
    method = MethodConfig(name="lora", r=4, init_lora_weights=init, **own)
    one = configured(still_place, tmp_path / "one", "lora").model_copy(update={"method": method})
    assert run(one).code == 0
    endings = train_on(changed(one, tmp_path / "several", "ddp"), 2)
    assert [e.code for e in endings] == [0, 0], endings[0].output + endings[-1].output
    assert_same(tmp_path / "one", tmp_path / "several")
    assert endings[0].output.count(f"init       {init}: ") == 1 and "init  " not in endings[1].output
    endings = train_on(changed(one, tmp_path / "sharded", "fsdp"), 2)
    assert [e.code for e in endings] == [2, 2] and "it is learned on the whole model" in endings[0].output
