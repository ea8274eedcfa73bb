"""LoRA's initializations in `siliang train`: the plan, a stop and a resumption to the same bits, and the merge."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from siliang.config import RunConfig
from siliang.plan.preflight import Planner
from siliang.run_folder import open_run
from siliang.train.log import Progress
from siliang.train.run import train
from siliang.train.types import Listener
from siliang.types import ConfigError, InterruptedRunError
from siliang.use.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
BY_DATA = ("eva", "corda", "lora_ga")
INITIALIZATIONS = ("orthogonal", "mica", *BY_DATA)


def configured(place: dict[str, Path], data: Path, output: Path, method: dict[str, Any], **settings: Any) -> RunConfig:
    """Four steps, each of them logged."""
    steps = {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "precision": "fp32", "log_every": 1}
    values = {
        "model": str(place["llama"]),
        "task": "causal_lm",
        "method": {"name": "lora", "r": 2, **method},
        "data": {"train": str(data), "test_size": 0.2, "max_length": 32},
        "train": steps | settings,
        "output": str(output),
        "accept": ["SL042"],
    }
    return RunConfig.build(values)


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def stopped_after(step: int) -> Listener:
    stopped: list[int] = []

    def stop(progress: Progress) -> None:
        if progress.step == step and not stopped:  # a second signal would not wait for the checkpoint
            stopped.append(step)
            signal.raise_signal(signal.SIGTERM)

    return Listener(progress=stop)


@pytest.mark.parametrize("init", INITIALIZATIONS)
def test_an_initialization_through_a_run(
    init: str, model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path
) -> None:
    def config(name: str) -> RunConfig:
        method = {"init_lora_weights": init, "lora_dropout": 0.1}
        return configured(model_folders, instruction_file, tmp_path / name, method)

    planner = Planner()
    record = train(config("whole"), planner=planner)
    losses = [line.loss for line in record.steps if line.loss is not None]
    assert record.status == "completed" and len(set(losses)) == 4
    assert planner.last_plan is not None and planner.last_plan.error is None
    lines: list[str] = []
    if init in BY_DATA:
        assert record.learned is not None and record.learned.start == init
        assert record.learned.rows > 0 and record.learned.tokens > record.learned.rows
    else:
        assert record.learned is None
    noted = any("learning the initialization from data takes" in note for note in planner.last_plan.notes)
    assert noted is (init in ("corda", "lora_ga"))
    tensors = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    assert planner.last_plan.adapter_bytes == sum(t.nbytes for t in tensors.values())
    assert planner.last_plan.trained == record.parameters.trained
    with pytest.raises(InterruptedRunError):
        train(config("stopped"), stopped_after(2))
    resumed = train(config("stopped"), Listener(say=lines.append), resume=True)
    assert resumed.learned is None or (record.learned is not None and resumed.learned.rows == record.learned.rows)
    assert not any(line.startswith("init  ") for line in lines)  # it is in the checkpoint
    assert (resumed.learned is None) is (init not in BY_DATA)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    assert merge(open_run(tmp_path / "whole"), tmp_path / "merged").holds


def test_rows_that_are_read_again_are_said_to_be(
    model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(instruction_file.read_text("utf-8").splitlines(keepends=True)[:10]), "utf-8")
    lines: list[str] = []
    config = configured(model_folders, few, tmp_path / "run", {"init_lora_weights": "eva"})
    record = train(config, Listener(say=lines.append))
    said = next(line for line in lines if line.startswith("init  "))
    assert record.learned is not None and record.learned.rows > 8
    assert f"eva: {record.learned.rows:,} rows (the 8 training rows, repeatedly) with" in said


def test_loraplus_has_nothing_to_speed_up_in_mica(
    model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path
) -> None:
    config = configured(
        model_folders, instruction_file, tmp_path / "run", {"init_lora_weights": "mica"}, loraplus_ratio=4
    )
    with pytest.raises(ConfigError, match="lora has no B that would train faster"):
        train(config)
