"""Plans that are kept: a second run does not plan again, and what the plan depends on makes another."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from siliang.check import gather_input
from siliang.config import RunConfig
from siliang.data.small_table import SmallTable
from siliang.data.token_key import code_hash
from siliang.data.tokens import TokenSet
from siliang.hardware import Choice, machine
from siliang.plan.device import Device
from siliang.plan.fake_run import FakeRun
from siliang.plan.kept import content_key
from siliang.plan.preflight import Planner

AMPLE = Device("cpu", 64 * 10**9, "free here", Choice("fp32", "as asked"), 500_000_000, 90_000_000, here=True)


class Counted:
    """Plans runs, and counts the models that this takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        monkeypatch.setenv("SILIANG_CACHE", str(folder))
        self.folder, self.made = folder / "plans", 0
        real = FakeRun.__init__

        def counting(*args: Any, **settings: Any) -> None:
            self.made += 1
            real(*args, **settings)

        monkeypatch.setattr(FakeRun, "__init__", counting)

    def __call__(self, config: RunConfig, device: Device = AMPLE) -> tuple[int, Any]:
        """How many models the plan took, in a process of its own, and the plan."""
        before, planner = self.made, Planner(device)
        planner(config, gather_input(config, machine()), lambda line: None)
        return self.made - before, planner.last_plan


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counted:
    return Counted(monkeypatch, tmp_path / "cache")


def changed(config: RunConfig, **settings: Any) -> RunConfig:
    values = config.model_dump(mode="json")
    for section, more in settings.items():
        values[section] = {**(values[section] or {}), **more} if isinstance(more, dict) else more
    return RunConfig.build(values)


def test_a_second_run_has_the_plan_of_the_first(planned: Counted, reviews: RunConfig) -> None:
    reviews = changed(reviews, data={"seed": 0})  # otherwise other rows are held out with another seed
    made, first = planned(reviews)
    assert made == 1
    assert planned(changed(reviews, output="elsewhere", train={"seed": 5})) == (0, first)
    larger = replace(AMPLE, process_bytes=600_000_000, work_bytes=10**8, memory_bytes=80 * 10**9)
    made, second = planned(reviews, larger)
    assert made == 0 and second.tensor_bytes == first.tensor_bytes
    assert second.peak_bytes == first.peak_bytes + 110_000_000  # the process has grown, and so have the kernels
    assert second.loading_bytes == first.loading_bytes + 100_000_000


def test_what_a_plan_depends_on_makes_another(
    planned: Counted, reviews: RunConfig, review_file: Path, tmp_path: Path
) -> None:
    assert planned(reviews)[0] == 1
    assert planned(changed(reviews, train={"batch_size": 3}))[0] == 1
    assert planned(changed(reviews, method={"name": "lora", "r": 4}))[0] == 1
    base = tmp_path / "base"
    base.mkdir()
    for file in Path(reviews.model).iterdir():
        os.link(file, base / file.name)
    copied = changed(reviews, model=str(base))
    assert planned(copied)[0] == 1 and planned(copied)[0] == 0
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").unlink()
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] * 2}))
    assert planned(copied)[0] == 1
    data = tmp_path / review_file.name
    data.write_bytes(review_file.read_bytes())
    moved = changed(reviews, data={"train": str(data)})
    assert planned(moved)[0] == 1 and planned(moved)[0] == 0
    lines = data.read_bytes().splitlines(keepends=True)
    data.write_bytes(b"".join(lines[:-2]))
    assert planned(moved)[0] == 1


def test_with_little_memory_nothing_is_kept(planned: Counted, reviews: RunConfig) -> None:
    small = replace(AMPLE, memory_bytes=2 * 10**9)
    assert planned(reviews, small)[0] == planned(reviews, small)[0] == 1
    assert planned(reviews)[0] == 1 and planned(reviews)[0] == 0
    assert planned(reviews, small)[0] == 1  # what is kept is not for it
    counted = changed(reviews, train={"memory_budget": "5GB"})  # with the process, whose size changes
    assert planned(counted)[0] == planned(counted)[0] == 1


@pytest.mark.parametrize("damage", ["", "{}", "[1]", "half", "more"])
def test_a_damaged_plan_is_made_anew(damage: str, planned: Counted, reviews: RunConfig) -> None:
    first = planned(reviews)[1]
    (file,) = planned.folder.iterdir()
    good = file.read_text()
    bad = {"half": good[: len(good) // 2], "more": json.dumps(json.loads(good) | {"x": 1})}
    file.write_text(bad.get(damage, damage))
    assert planned(reviews) == (1, first)
    assert file.read_text() == good
    assert planned(reviews) == (0, first)


def test_a_cache_that_cannot_be_written(planned: Counted, reviews: RunConfig) -> None:
    planned.folder.parent.mkdir()
    planned.folder.write_text("a file where the folder would be")
    assert planned(reviews)[0] == planned(reviews)[0] == 1


def test_a_run_with_another_seed_says_nothing_of_the_machine(
    planned: Counted, reviews: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[str] = []
    monkeypatch.setattr("siliang.plan.preflight.record_work", lambda name, work: stored.append(name))
    record = SimpleNamespace(device=SimpleNamespace(name="a CPU"), memory=SimpleNamespace(steps_bytes=10**9))
    reviews = changed(reviews, data={"seed": 0})
    for seed, count in ((1, 1), (2, 1), (1, 2)):  # the second has the plan of the first
        planner, config = Planner(AMPLE), changed(reviews, train={"seed": seed})
        planner(config, gather_input(config, machine()), lambda line: None)
        planner.calibrate(cast("Any", record))
        assert len(stored) == count
    assert planned.made == 1


def test_a_key_has_the_types_of_tokens_the_library_of_4_bits_and_code_from_outside(
    reviews: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = gather_input(reviews, machine())

    def key(config: RunConfig = reviews) -> str | None:
        return content_key(config, subject, AMPLE)

    keys = [key()]
    assert key() == keys[0]
    tokens = subject.prepared.train
    types = [[i % 2 for i in range(n)] for n in tokens.lengths.tolist()]
    for values in (types, [list(reversed(row)) for row in types]):
        table: Any = SmallTable(
            {"input_ids": tokens.table["input_ids"], "token_type_ids": values},
            {"input_ids": "int32", "token_type_ids": "int32"},
        )
        learned = TokenSet(table, tokens.spec)
        monkeypatch.setattr(subject.prepared, "train", learned)
        keys.append(key())
    quantized = changed(reviews, quantization={"bits": 4})
    monkeypatch.setattr("siliang.plan.kept.version", lambda name: "0.50")
    keys.append(key(quantized))
    monkeypatch.setattr("siliang.plan.kept.version", lambda name: "0.51")
    keys.append(key(quantized))
    code = tmp_path / "outside" / "own_method.py"
    code.parent.mkdir()
    for line in ("class Own:\n    pass\n", "class Own:\n    rank = 3\n"):
        code.write_text(line)
        spec = spec_from_file_location("own_method", code)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "own_method", module)
        spec.loader.exec_module(module)
        own = type(subject.method)
        monkeypatch.setattr(subject, "method", type("Outside", (module.Own, own), {"__module__": "own_method"})())
        code_hash.cache_clear()
        keys.append(key())
    assert len(set(keys)) == len(keys) == 7
    monkeypatch.delattr(sys.modules["own_method"], "__file__")
    assert key() is None  # as in a notebook: nothing says whether its code has changed


def test_headers_of_weights_are_read_where_their_format_matters(
    planned: Counted, reviews: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(sys.modules["siliang.run_folder.kept_format"], "stored_format", lambda *of: asked.append(of[0]))
    for config, device in (
        (RunConfig.build(reviews.model_dump(mode="json") | {"method": {"name": "full"}}), AMPLE),
        (reviews, replace(AMPLE, precision=Choice("bf16", "as asked"))),
    ):
        content_key(config, gather_input(config, machine()), device)
        assert not asked
    content_key(reviews, gather_input(reviews, machine()), AMPLE)
    assert asked
