"""What a run caches of its frozen layers' outputs, planned and made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from siliang.config import RunConfig
from siliang.engine.budget import MemoryBudget
from siliang.engine.frozen import StateStore
from siliang.hardware import Choice
from siliang.ops.masked_ce import CHUNK_BYTES
from siliang.plan import plan
from siliang.plan.device import Device
from siliang.plan.preflight import Planner
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
