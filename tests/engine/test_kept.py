"""An opened run keeps its engine: a second prediction is a forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from every_task import configured, make_models
from tiny import WORDS

from siliang.run_folder import OpenedRun, open_run
from siliang.train.run import train
from siliang.use import evaluate as use
from siliang.use.predict import predict


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> OpenedRun:
    folder = tmp_path_factory.mktemp("kept")
    train(configured("seq_cls", make_models(folder), folder))
    return open_run(Path(folder / "run"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An item for each engine that was made."""
    found: list[int] = []
    kind = use.Engine

    def make(*args: Any, **settings: Any) -> Any:
        found.append(1)
        return kind(*args, **settings)

    monkeypatch.setattr(use, "Engine", make)
    return found


def ask(run: OpenedRun) -> list[float | None]:
    return [p.probability for p in predict(run, [" ".join(WORDS[:5]), WORDS[7]])]


def hooks(run: OpenedRun) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in run.model.modules())


def test_a_second_prediction_is_one_forward_pass(run: OpenedRun, made: list[int]) -> None:
    before, first = hooks(run), ask(run)
    passes: list[int] = []
    base = run.model.get_base_model()
    kind, own = type(base), type(base).forward
    try:
        kind.forward = lambda *args, **named: (passes.append(1), own(*args, **named))[1]
        assert ask(run) == first
    finally:
        kind.forward = own
    assert len(passes) == len(made) == 1 and hooks(run) == before


def test_predictions_that_are_read_in_turn(run: OpenedRun, made: list[int]) -> None:
    first, before = ask(run), hooks(run)
    one, other = (predict(run, [" ".join(WORDS[:5]), WORDS[7]]) for _ in range(2))
    pairs = [(a.probability, b.probability) for a, b in zip(one, other, strict=True)]
    assert pairs == [(p, p) for p in first] and len(made) <= 1
    assert hooks(run) == before


def change_weights(run: OpenedRun) -> None:
    with torch.no_grad():
        next(p for n, p in run.model.named_parameters() if "lora_B" in n).add_(0.1)


def change_layer(run: OpenedRun) -> None:
    run.model.get_base_model().bert.encoder.layer[0].register_forward_hook(lambda m, args, output: None)


def change_adapter(run: OpenedRun) -> None:
    run.model.injection.switch(on=False)


def change_settings(run: OpenedRun) -> None:
    run.config.train.packing = False


@pytest.mark.parametrize("change", [change_weights, change_layer, change_adapter, change_settings])
def test_a_change_makes_another(run: OpenedRun, made: list[int], change: Any) -> None:
    ask(run)
    made.clear()
    change(run)
    ask(run)
    ask(run)
    assert len(made) == 1
