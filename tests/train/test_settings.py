"""Settings of the loop: other optimizers from config to checkpoint and back, early stopping, and what a plan says."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from faults.runs import Place, make_place, run
from siliang.config import RunConfig
from siliang.records import Record
from siliang.run_folder import CHECKPOINTS
from siliang.train import loop
from siliang.train.loop import Training
from siliang.train.optimizer import state_tensors
from siliang.train.prepare import prepare
from siliang.train.run import train
from siliang.train.saving import checkpoints
from siliang.train.types import Listener
from siliang.types import ConfigError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("settings"))


def configured(place: Place, folder: Path, method: str = "lora", **settings: Any) -> RunConfig:
    return place.config(folder, method, **({"max_steps": 6, "log_every": 1} | settings))


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


SETTINGS: dict[str, dict[str, Any]] = {
    **{
        name: {"optimizer": name, "loraplus_ratio": 4.0, "layerwise_decay": 0.9} for name in ("adamw_8bit", "adafactor")
    },
    **{name: {"optimizer": name, "loraplus_ratio": 4.0, "layerwise_decay": 0.9} for name in ("lion", "muon")},
    "neftune": {"neftune_alpha": 40.0},
    "label smoothing": {"label_smoothing": 0.2},
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_run_resumes_to_the_same_bits(name: str, place: Place, tmp_path: Path) -> None:
    more = SETTINGS[name] | {"save_every": 3, "keep": 9}
    whole = configured(place, tmp_path / "whole", **more)
    train(whole)
    part = configured(place, tmp_path / "part", **more)
    train(part)
    folder = tmp_path / "part"
    record = Record.read(folder)
    record.status, record.final, record.steps = "interrupted", {}, record.steps[:3]
    record.write(folder)
    for path in (*(folder / "adapter").iterdir(), *(folder / CHECKPOINTS / "checkpoint-6").iterdir()):
        path.unlink()
    (folder / "adapter").rmdir()
    (folder / CHECKPOINTS / "checkpoint-6").rmdir()
    ended = run(part, resume=True)
    assert ended.code == 0, ended.output
    assert weights(folder) == weights(tmp_path / "whole")
    losses = [
        [line.loss for line in Record.read(f).steps if line.loss is not None] for f in (folder, tmp_path / "whole")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_run_that_was_stopped_behind_its_last_checkpoint(place: Place, tmp_path: Path) -> None:
    """Its log has the last evaluation once, and its results are those of an undisturbed run."""
    more = {"save_every": 3, "eval_every": 2}
    whole = train(configured(place, tmp_path / "whole", **more))

    def stop(trained: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(configured(place, tmp_path / "part", **more), Listener(trained=stop))
    part = train(configured(place, tmp_path / "part", **more), resume=True)
    lines = [[line.model_dump(exclude={"tokens_per_s"}) for line in record.steps] for record in (part, whole)]
    assert lines[0] == lines[1] and part.final == whole.final
    assert weights(tmp_path / "part") == weights(tmp_path / "whole")


def test_patience_ends_a_run_that_gets_no_better(place: Place, tmp_path: Path) -> None:
    said: list[str] = []
    rate = 1e-9  # of which nothing comes
    config = configured(
        place, tmp_path / "run", max_steps=20, eval_every=2, patience=2, learning_rate=rate, save_every=7
    )
    record = train(config, Listener(said.append))
    evaluated = [line.step for line in record.steps if line.eval_loss is not None]
    assert record.status == "completed" and evaluated[-1] < 20
    losses = [line.eval_loss for line in record.steps if line.eval_loss is not None]
    assert min(losses[:-2]) <= min(losses[-2:])  # type: ignore[type-var]
    assert any("train.patience" in line for line in said)
    assert max(checkpoints(tmp_path / "run" / CHECKPOINTS)) == evaluated[-1]
    with pytest.raises(ConfigError, match=r"train.patience = 2 needs train\.eval_every"):
        train(configured(place, tmp_path / "other", patience=2, eval_every=None))


def test_learning_rates_that_no_parameter_has_are_refused(place: Place, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.loraplus_ratio = 16: bitfit has no B that would train faster"):
        train(configured(place, tmp_path / "bitfit", "bitfit", loraplus_ratio=16))
    with pytest.raises(ConfigError, match=r"train\.layerwise_decay = 0\.9: what head trains is above all layers"):
        head = configured(place, tmp_path / "head", "head", layerwise_decay=0.9).model_dump(mode="json")
        train(RunConfig.build(head | {"method": {"name": "head", "modules_to_save": ["lm_head"]}}))


def test_noise_and_smoothing_change_the_training_and_no_evaluation(place: Place, tmp_path: Path) -> None:
    first = {}
    for name in ("plain", "neftune", "label smoothing"):
        more = SETTINGS.get(name, {}) | {"max_steps": 1, "eval_every": 1, "learning_rate": 1e-12}
        steps = train(configured(place, tmp_path / name, **more)).steps
        first[name] = [
            next(x for x in (getattr(line, what) for line in steps) if x is not None) for what in ("loss", "eval_loss")
        ]
    for name in ("neftune", "label smoothing"):
        assert abs(first[name][0] - first["plain"][0]) > 1e-4
        assert first[name][1] == pytest.approx(first["plain"][1], rel=1e-6)


def test_a_plan_counts_the_noise(place: Place, tmp_path: Path) -> None:
    from siliang.plan import plan, target_device

    peaks = []
    for alpha in (None, 5.0):
        config = configured(place, tmp_path / "run", neftune_alpha=alpha, precision="fp32")
        (found,) = plan(config, target_device(config), timed=False).methods
        assert found.error is None
        peaks.append(found.peak_bytes)
    assert peaks[1] >= peaks[0]


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor", "lion", "muon"])
def test_a_plan_knows_the_state_of_each_optimizer(name: str, place: Place, tmp_path: Path) -> None:
    """Beside the bytes that a run's own optimizer holds after a step."""
    from siliang.plan import plan, target_device

    config = configured(place, tmp_path / "run", "full", optimizer=name, max_steps=1, precision="fp32")
    (tmp_path / "run").mkdir()
    prepared = prepare(config, Listener(), tmp_path / "run")
    training = Training(prepared)
    training.run()
    inner: Any = training.optimizer
    tensors = [t for t in state_tensors(inner.optimizer) if t.dim() > 0]
    codes = [t for t in tensors if t.numel() == 256 and t.dtype == torch.float32 and name == "adamw_8bit"]  # shared
    held = sum(t.nbytes for t in tensors) - sum(t.nbytes for t in codes)
    found = plan(config, target_device(config), timed=False).methods[0]
    assert found.error is None
    assert found.parts["optimizer"] == pytest.approx(held, rel=0.05, abs=4096)


def test_the_speed_of_training_is_that_of_its_steps(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations and checkpoints are slowed down here; a resume goes on with the sum."""

    def slowed(what: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any, **settings: Any) -> Any:
            time.sleep(0.6)
            return what(*args, **settings)

        return slow

    for name in ("measure", "save_checkpoint"):
        monkeypatch.setattr(loop, name, slowed(getattr(loop, name)))
    shown: list[float] = []
    more = {"eval_every": 2, "save_every": 2, "log_every": 2, "schedule": "constant"}
    half = train(
        configured(place, tmp_path / "run", max_steps=4, **more),
        Listener(progress=lambda p: shown.append(p.tokens_per_s)),
    )
    assert half.seconds.train - half.seconds.steps > 4 * 0.6
    whole = train(configured(place, tmp_path / "run", max_steps=8, **more), resume=True)
    # the checkpoint that is resumed from was made before its own time was known
    assert whole.seconds.train - whole.seconds.steps > 7 * 0.6 and whole.seconds.steps > half.seconds.steps
    slow = whole.tokens_trained / whole.seconds.train
    assert all(line.tokens_per_s > slow for line in whole.steps if line.tokens_per_s is not None)
    assert shown[-1] == pytest.approx(half.tokens_trained / half.seconds.steps, rel=0.2)
