"""A run that was stopped and goes on ends as one that was never stopped: the same bits, the same log."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from faults.damage import damage_adapters, damage_checkpoints
from faults.kills import kill_at_random
from faults.runs import METHODS, Child, Place, damaged_parts, make_place, outcome, run
from siliang.config import RunConfig
from siliang.files import replacing_folder
from siliang.records import Record
from siliang.train.saving import checkpoints, read_state

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked, which this system cannot")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("faults"))


def stop_and_go_on(config: RunConfig, *steps: int) -> dict[str, Any]:
    """The outcome of a run that is told to stop in each of these steps."""
    folder = Path(config.output)
    for i, step in enumerate(steps):
        child = Child(config, resume=i > 0, pace_s=0.01)
        assert child.wait_for(f"step {step}\n"), child.end().output
        child.signal(signal.SIGTERM)
        ending = child.end()
        assert ending.code == 130 and "Resume with: siliang train --resume" in ending.output, ending.output
        assert Record.read(folder).status == "interrupted"
    ending = run(config, resume=True)
    assert ending.code == 0, ending.output
    return outcome(folder)


# in `make test` one of each kind; all of them in `make test-long`
SHORT = ("lora", "prefix_tuning", "full")


@pytest.mark.parametrize("method", [m if m in SHORT else pytest.param(m, marks=pytest.mark.long) for m in METHODS])
def test_every_method(method: str, place: Place, tmp_path: Path) -> None:
    """Step 7 and 14 are evaluated, 12 ends an epoch, 36 is the last, 5 and 26 are between the lines of the log."""
    assert run(place.config(tmp_path / "whole", method)).code == 0
    whole = outcome(tmp_path / "whole")
    assert len(whole["log"]) == 9 + 5 + 1 and whole["tokens"] > 0
    assert stop_and_go_on(place.config(tmp_path / "parts", method), 5, 12, 14, 26) == whole


@pytest.mark.parametrize(
    ("method", "group_by_length"), [("head", True), ("bitfit", False), ("lora", True), ("full", False)]
)
def test_a_classifier(
    method: str, group_by_length: bool, model_folders: dict[str, Path], review_file: Path, tmp_path: Path
) -> None:
    """Its head is new, and its rows come by length."""

    def config(name: str) -> RunConfig:
        train = {"epochs": 3, "batch_size": 4, "log_every": 3, "eval_every": 5, "save_every": 4, "learning_rate": 1e-2}
        values = {
            "model": str(model_folders["bert"]),
            "task": "seq_cls",
            "method": method,
            "data": {"train": str(review_file), "test_size": 0.2, "max_length": 32},
            "train": train | {"group_by_length": group_by_length},
            "accept": ["SL002", "SL003"],
            "output": str(tmp_path / name),
        }
        return RunConfig.build(values)

    assert run(config("whole")).code == 0
    assert stop_and_go_on(config("parts"), 4, 17) == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16"},
        {"precision": "pure-bf16"},
        {"packing": False, "tokens_at_once": 16},
        {"gradient_checkpointing": True},
        {"schedule": "cosine", "weight_decay": 0.1, "max_steps": 30, "save_every": 4},
        {"best": "loss", "eval_every": 5, "keep": 1},
    ],
    ids=str,
)
def test_settings(settings: dict[str, Any], place: Place, tmp_path: Path) -> None:
    assert run(place.config(tmp_path / "whole", **settings)).code == 0
    assert stop_and_go_on(place.config(tmp_path / "parts", **settings), 7, 20) == outcome(tmp_path / "whole")


def test_frozen_layers_that_are_kept(place: Place, tmp_path: Path) -> None:
    """What they said in the first epoch is not in the checkpoint, and comes again in the same bits."""
    arguments = {"name": "lora", "r": 4, "layers_to_transform": [1]}
    model = make_place(tmp_path / "place").model
    config = (model / "config.json").read_text().replace('"attention_dropout": 0.1', '"attention_dropout": 0.0')
    (model / "config.json").write_text(config)
    place = Place(model, place.data)

    def configured(folder: Path) -> Any:
        config = place.config(folder)
        return config.model_copy(update={"method": type(config.method)(**arguments)})

    assert run(configured(tmp_path / "whole")).code == 0
    child = Child(configured(tmp_path / "parts"), pace_s=0.01)
    assert child.wait_for("step 20\n")
    child.signal(signal.SIGINT)
    assert child.end().code == 130
    assert run(configured(tmp_path / "parts"), resume=True).code == 0
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_killed_at_random_moments(place: Place, tmp_path: Path) -> None:
    counts = kill_at_random(place, tmp_path, kills=4)
    assert counts.passed, counts


def test_damage_is_noticed(place: Place, tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    for counts in (
        damage_checkpoints(place, tmp_path, cases=4),
        damage_adapters(place, tmp_path / "adapters", cases=12),
    ):
        assert counts.passed and counts.noticed, counts


def test_a_checkpoint_holds_no_pickle(place: Place, tmp_path: Path) -> None:
    assert run(place.config(tmp_path / "run", keep=3)).code == 0
    found = checkpoints(tmp_path / "run" / "checkpoints")
    assert list(found) == [30, 33, 36]
    assert {p.suffix for p in (tmp_path / "run").rglob("*") if p.is_file()} == {".json", ".md", ".safetensors", ".yaml"}
    state = read_state(found[36])
    assert state["optimizer"]["state"][0]["step"] == 36.0
    assert isinstance(state["optimizer"]["param_groups"][0]["betas"], tuple)
    assert state["random"][0]["torch"].dtype == torch.uint8
    assert not damaged_parts(tmp_path / "run")


def test_all_checkpoints_damaged(place: Place, tmp_path: Path) -> None:
    assert run(place.config(tmp_path / "whole", eval_every=None)).code == 0
    wanted = outcome(tmp_path / "whole")
    for path in (tmp_path / "whole" / "checkpoints").iterdir():
        (path / "manifest.json").write_text("{}")
    ending = run(place.config(tmp_path / "whole", eval_every=None), resume=True)
    assert ending.code == 0 and "no intact checkpoint is left" in ending.output
    assert outcome(tmp_path / "whole") == wanted


def test_time_limits(place: Place, tmp_path: Path) -> None:
    """Saved by the clock, and stopped before the limit."""
    config = place.config(tmp_path / "run", save_every=None, save_every_minutes=0.004, max_time="6s", epochs=400)
    ending = run(config)
    assert ending.code == 130 and "train.max_time is nearly over" in ending.output, ending.output
    assert len(checkpoints(tmp_path / "run" / "checkpoints")) == 2
    assert Record.read(tmp_path / "run").seconds.train < 6


def test_the_best_step_is_kept(place: Place, tmp_path: Path) -> None:
    """At a rate at which it only gets worse, the weights are those of the first evaluation."""
    config = place.config(tmp_path / "run", best="loss", eval_every=4, learning_rate=1.0, keep=1)
    ending = run(config)
    assert ending.code == 0, ending.output
    record = Record.read(tmp_path / "run")
    losses = {s.step: s.eval_loss for s in record.steps if s.eval_loss is not None}
    assert record.best_step is not None and losses[record.best_step] == min(losses.values())
    assert record.best_step < 36 and record.final["eval_loss"] == losses[record.best_step]
    saved = checkpoints(tmp_path / "run" / "checkpoints")
    assert set(saved) == {record.best_step, 36}
    weights = "adapter_model.safetensors"
    best, last = (saved[step] / weights for step in (record.best_step, 36))
    assert (tmp_path / "run" / "adapter" / weights).read_bytes() == best.read_bytes() != last.read_bytes()


def test_the_data_has_changed(place: Place, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    shutil.copy(place.data, data)
    config = Place(place.model, data).config(tmp_path / "run")
    child = Child(config, pace_s=0.01)
    assert child.wait_for("step 5\n")
    child.signal(signal.SIGTERM)
    child.end()
    data.write_text(data.read_text().replace("w1", "w2"))
    ending = run(config, resume=True)
    assert ending.code == 2 and "The data has changed since the run started" in ending.output


def test_half_a_folder_is_never_there(tmp_path: Path) -> None:
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "old").write_text("old")
    with pytest.raises(OSError, match="full"), replacing_folder(tmp_path / "done") as folder:
        (folder / "new").write_text("half")
        raise OSError(28, "full")
    assert [p.name for p in tmp_path.rglob("*")] == ["done", "old"]
