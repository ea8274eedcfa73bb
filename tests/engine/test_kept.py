"""An opened run keeps its engine: a second prediction is a forward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from every_task import configured, make_models
from tiny import WORDS

from siliang.config import RunConfig
from siliang.hardware import Choice
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


def test_a_weight_in_the_place_of_a_deleted_one(run: OpenedRun, made: list[int]) -> None:
    """It may have the memory of the deleted one, and its object the number."""
    ask(run)
    made.clear()
    layer = next(m for m in run.model.modules() if isinstance(m, torch.nn.LayerNorm))
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.weight.requires_grad)
    ask(run)
    assert len(made) == 1


@pytest.mark.parametrize("how", ["prompt_name", "precision", "max_length", "adapter"])
def test_what_a_changed_run_predicts_is_what_a_new_one_does(how: str, tmp_path: Path) -> None:
    """The engine of the first prediction is not taken for the second one where it would give something else."""
    task = "embedding" if how == "prompt_name" else "seq_cls"
    config = configured(task, make_models(tmp_path), tmp_path)
    if task == "embedding":
        prompts = {"embedding": {"query_prompt": " ".join(WORDS[3:6])}}
        config = RunConfig.build(config.model_dump(mode="json") | prompts)
    train(config)
    folder, texts = Path(tmp_path / "run"), [" ".join(WORDS[:9]), WORDS[7]]

    def change(run: OpenedRun) -> OpenedRun:
        match how:
            case "prompt_name":
                return replace(run, prompt_name="query")
            case "precision":
                return replace(run, precision=Choice("bf16", "as in training"))
            case "max_length":
                data = run.config.data.model_copy(update={"max_length": 4, "too_long": "cut"})
                return replace(run, config=run.config.model_copy(update={"data": data}))
            case "adapter":
                run.model.injection.switch(on=False)
        return run

    def values(run: OpenedRun) -> list[dict[str, Any]]:
        return [p.values() for p in predict(run, texts)]

    kept = open_run(folder)
    first = values(kept)
    second = values(change(kept))
    assert second == values(change(open_run(folder)))
    assert second != first
