"""A loss that is not a number stops the run, with the reason."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make, word_tokenizer

from siliang.config import RunConfig
from siliang.run_folder import CHECKPOINTS, checkpoints
from siliang.train.guard import USELESS_STEPS, BadStep, Guard
from siliang.train.log import Log, Progress
from siliang.train.loop import Training
from siliang.train.prepare import prepare
from siliang.train.run import train
from siliang.train.types import Listener
from siliang.types import TrainingError

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


def go(guard: Guard, losses: list[float], norms: list[float]) -> BadStep | None:
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1):
        guard.record(step, torch.tensor(loss), norm, [2 * step, 2 * step + 1])
    return guard.check()


def test_the_first_bad_step_is_named() -> None:
    """Also when it is looked for only later, as on a GPU."""
    nan = float("nan")
    bad = go(Guard(scaled=False), [1.0, 1.0, nan, nan], [1.0, 1.0, nan, nan])
    assert bad is not None
    assert (bad.what, bad.step, bad.rows) == ("loss", 3, (6, 7)) and math.isnan(bad.value)
    assert go(Guard(scaled=False), [1.0, 1.0], [1.0, float("inf")]) == BadStep("gradient", float("inf"), 2, (4, 5))


def test_overflow_under_loss_scaling_is_allowed_for_a_while() -> None:
    inf = float("inf")
    assert go(Guard(scaled=True), [1.0] * USELESS_STEPS, [inf] * (USELESS_STEPS - 1) + [1.0]) is None
    bad = go(Guard(scaled=True), [1.0] * USELESS_STEPS, [inf] * USELESS_STEPS)
    assert bad is not None and (bad.what, bad.step) == ("gradient", 1)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_zeros(what: str) -> None:
    ones, zeros = [1.0] * USELESS_STEPS, [0.0] * USELESS_STEPS
    bad = go(Guard(scaled=False), *((zeros, ones) if what == "loss" else (ones, zeros)))
    assert bad is not None and (bad.what, bad.value, bad.step) == (what, 0.0, 1)
    now_and_then = [0.0, 0.0, 1.0] * USELESS_STEPS
    assert go(Guard(scaled=False), now_and_then, now_and_then) is None


def settings(model: Path, data: Path, output: Path, **more: Any) -> RunConfig:
    section = {"max_steps": 40, "batch_size": 4, "save_every": 2, "warmup_fraction": 0.0} | more
    data_section = {"train": str(data), "test_size": 0.0, "max_length": 64}
    return RunConfig.build(
        {"model": str(model), "task": "causal_lm", "data": data_section, "train": section, "output": str(output)}
    )


def test_a_learning_rate_out_of_all_reason(
    model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path
) -> None:
    config = settings(model_folders["llama"], instruction_file, tmp_path / "run", learning_rate=1e30)
    with pytest.raises(
        TrainingError,
        match=r"(?s)Step \d+: the .* is (nan|inf|0 in 25 steps)[^,]*, in a batch of .*jsonl:\d+.*times lora",
    ):
        train(config)
    record = json.loads((tmp_path / "run" / "run.json").read_text()) if (tmp_path / "run").exists() else {}
    assert record.get("status", "failed") == "failed"
    for weights in (tmp_path / "run").rglob("adapter_model.safetensors"):  # what was saved is sound
        assert all(torch.isfinite(t).all() for t in load_file(weights).values())


def test_broken_base_weights(instruction_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model: Any = make("llama")
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"(?s)Step 1: the loss is nan.*up_proj.weight holds nan.*no checkpoint"):
        train(settings(folder, instruction_file, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_steps_that_are_left_out_are_not_in_the_logged_loss(
    model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path
) -> None:
    """Also where a checkpoint was made between such a step and the line."""

    def logged(bad: int, log_every: int, checkpoint: Path | None = None) -> tuple[list[float | None], list[Progress]]:
        seen: list[Progress] = []
        more: dict[str, Any] = {"max_steps": 3, "log_every": log_every, "on_nan": "skip 1", "learning_rate": 1e-3}
        config = settings(model_folders["llama"], instruction_file, tmp_path / "run", **more)
        folder = tmp_path / f"bad-{bad}-every-{log_every}-{'new' if checkpoint is None else 'resumed'}"
        folder.mkdir()
        run = prepare(config, Listener(), folder)
        norm = run.model.get_base_model().model.norm.weight
        sound = norm.detach().clone()

        def spoil(step: int) -> None:
            with torch.no_grad():
                norm.copy_(sound * float("nan") if step + 1 == bad else sound)

        training = Training(run, log=Log(seen.append), on_step=lambda training: spoil(training.step))
        spoil(training.step if checkpoint is None else 2)
        training.run(checkpoint)
        assert training.guard.skipped == [bad]
        return [line.loss for line in training.log.lines], seen

    (one, two, three), _ = logged(2, log_every=1)
    assert one is not None and two is None and three is not None
    (mean,), _ = logged(2, log_every=3)
    assert mean == pytest.approx((one + three) / 2, rel=1e-6)
    checkpoint = checkpoints(tmp_path / "bad-2-every-3-new" / CHECKPOINTS)[2]
    assert logged(2, 3, checkpoint)[0] == [mean]
    _, seen = logged(1, log_every=3)
    assert [p.loss is None for p in seen] == [True, True, True, False]
