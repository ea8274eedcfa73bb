"""What a run keeps: outputs of its frozen layers, and activations; planned and made."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import make

from siliang import LoraConfig, get_peft_model
from siliang.config import RunConfig
from siliang.engine.budget import MemoryBudget
from siliang.engine.frozen import StateStore
from siliang.engine.step import Engine
from siliang.hardware import Choice
from siliang.ops.masked_ce import CHUNK_BYTES
from siliang.plan import model_config, plan
from siliang.plan.budget import room_for_activations
from siliang.plan.device import Device
from siliang.plan.fake_run import FakeRun
from siliang.plan.fit import recomputed_layers
from siliang.plan.preflight import Planner
from siliang.plan.rows import synthetic_rows
from siliang.tasks import TASKS
from siliang.train.optimizer import OPTIMIZERS
from siliang.train.run import train

THERE = Device("cpu", 24 * 10**9, "as asked", Choice("fp32", "as asked"), 0, 0, here=True)


def top_layer(reviews: RunConfig, tmp_path: Path, **train_settings: Any) -> RunConfig:
    """A run of two epochs that trains its top layer alone."""
    values = reviews.model_dump(mode="json")
    values["train"] |= train_settings
    method = {"name": "lora", "layers_to_transform": [1]}
    return RunConfig.build(values | {"method": method, "output": str(tmp_path / "frozen")})


def test_the_plan_has_what_the_run_caches(reviews: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[StateStore] = []

    def within(budget: MemoryBudget, tokens: int | None = None) -> StateStore:
        made.append(StateStore(budget.for_cache(), 0, tokens))
        return made[-1]

    monkeypatch.setattr(StateStore, "within", within)
    planner = Planner()
    memory = train(top_layer(reviews, tmp_path), planner=planner).memory
    planned, (store,) = planner.last_plan, made
    assert planned is not None and planned.frozen_bytes == store._used == memory.predicted_parts["frozen"] > 0
    assert store.promised() == 0 and planned.frozen_disk_bytes == 0
    assert memory.predicted_bytes == planned.needed_bytes


@pytest.mark.parametrize("name", ["llama", "bloom", "t5"])
@pytest.mark.parametrize("limit", ["auto", 700_000_000])
def test_the_plan_recomputes_the_layers_that_the_engine_does(
    limit: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same room, and by the activations that the engine measures. T5 passes masks on, which the plan counts."""
    base: Any = make(name)
    base.config.save_pretrained(tmp_path)
    task = "seq_2_seq_lm" if name == "t5" else "causal_lm"
    values = {"model": str(tmp_path), "task": task, "data": {"train": "-", "max_length": 64}, "output": "-"}
    config = RunConfig.build(values | {"train": {"memory_budget": limit, "batch_size": 4}})
    device = Device("cpu", 10**9, "as asked", Choice("fp32", "as asked"), 10**8, 10**7, here=True)
    fake_run = FakeRun(config, model_config(config), device)
    batches = fake_run.batches(synthetic_rows(config).rows)
    measured = fake_run.measure(batches)

    model = get_peft_model(base, LoraConfig()).train()
    engine = Engine(model, TASKS[config.task], memory_budget=limit)
    held = device.overhead_bytes + measured.peaks["loaded"].nbytes + fake_run.trained_bytes
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**9 - held))
    monkeypatch.setattr("psutil.Process.memory_info", lambda process: SimpleNamespace(rss=held))
    engine.run(model, batches, 1.0)
    recompute = engine.recompute
    room = room_for_activations(config.train, device, fake_run, measured)
    assert recompute._room == room > 0
    assert sum(recompute.bytes_per_token) * batches[0].tokens == pytest.approx(sum(measured.layer_bytes), rel=0.03)
    for share in (1.05, 0.8, 0.6, 0.0):
        recompute._room = share * sum(measured.layer_bytes)
        assert recompute.needed(batches[0].tokens) == recomputed_layers(measured, recompute._room)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_room_is_without_the_state_of_the_optimizer(name: str, tmp_path: Path) -> None:
    base_model: Any = make("llama")
    base_model.config.save_pretrained(tmp_path)
    values = {"model": str(tmp_path), "task": "causal_lm", "data": {"train": "-", "max_length": 64}, "output": "-"}
    train_settings = {"memory_budget": 700_000_000}
    base = RunConfig.build(values | {"train": train_settings})
    fake_run = FakeRun(base, model_config(base), THERE)
    measured = fake_run.measure(fake_run.batches(synthetic_rows(base).rows))
    other = base.train.model_copy(update={"optimizer": name})
    rooms = [room_for_activations(t, THERE, fake_run, measured) for t in (base.train, other)]
    share = OPTIMIZERS[name].state_share
    assert rooms[1] - rooms[0] == (2 - share) * fake_run.trained_bytes
    model = get_peft_model(base_model, LoraConfig())
    adam, own = MemoryBudget(model, 1), MemoryBudget(model, 1, state_share=share)
    assert adam._to_come() - own._to_come() == (2 - share) * fake_run.trained_bytes


def test_it_is_a_part_of_the_peak(reviews: RunConfig, tmp_path: Path) -> None:
    one = plan(top_layer(reviews, tmp_path), THERE).methods[0]
    none = plan(top_layer(reviews, tmp_path, keep_frozen=False), THERE).methods[0]
    assert one.parts["frozen"] == one.frozen_bytes > 0 and none.frozen_bytes == 0
    assert sum(one.parts.values()) == one.peak_bytes == none.peak_bytes + one.frozen_bytes
    for same in ({"epochs": 1.0}, {"max_steps": 1}):
        assert plan(top_layer(reviews, tmp_path, **same), THERE).methods[0].frozen_bytes == 0


def test_a_tight_budget_leaves_the_cache_its_share_and_the_rest_goes_to_disk(
    reviews: RunConfig, tmp_path: Path
) -> None:
    one = plan(top_layer(reviews, tmp_path), THERE).methods[0]
    taken = one.loaded_bytes + 3 * one.adapter_bytes + 4 * CHUNK_BYTES
    tight = plan(top_layer(reviews, tmp_path, memory_budget=taken + 2 * one.frozen_bytes), THERE).methods[0]
    assert tight.frozen_bytes == one.frozen_bytes // 2
    assert tight.frozen_bytes + tight.frozen_disk_bytes == one.frozen_bytes


def test_dropout_below_is_found_on_paper_too(
    reviews: RunConfig, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    config = top_layer(reviews, tmp_path).model_copy(update={"model": str(model_folders["bert"])})
    assert plan(config, THERE).methods[0].frozen_bytes == 0
