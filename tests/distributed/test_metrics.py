"""The metrics of held-out rows are those of one process, whatever the number of ranks that share them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from every_task import TASKS, configured, make_models
from ranked import changed, train_on

from faults.runs import run
from siliang.records import Record

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked, which this system cannot")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("task", TASKS)
def test_metrics_on_several_ranks(task: str, models: dict[str, Path], tmp_path: Path) -> None:
    """12 held-out rows of unlike length in steps of 5: the last step has fewer rows than there are ranks."""
    config = configured(task, models, tmp_path, max_steps=1, batch_size=5, learning_rate=1e-5)
    assert run(config).code == 0
    one = Record.read(tmp_path / "run").final
    several_ways = [(2, "ddp"), (4, "ddp")]
    if task in ("seq_cls", "causal_lm"):  # the other tasks' logits are views, of which FSDP2 warns
        several_ways.append((2, "fsdp"))
    for size, strategy in several_ways:
        folder = tmp_path / f"{strategy}-{size}"
        endings = train_on(changed(config, folder, strategy), size)
        assert [e.code for e in endings] == [0] * size, endings[0].said + endings[-1].said
        several = Record.read(folder).final
        assert several.keys() == one.keys()
        for name, value in one.items():
            rounded = name.endswith(("loss", "perplexity", "margin", "reward"))
            close = pytest.approx(value, rel=1e-4, abs=1e-6) if rounded else pytest.approx(value, rel=1e-12)
            assert several[name] == close, (name, size, strategy)
