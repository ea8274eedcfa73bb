"""A comparison that goes on: from another folder, on other data, with runs that changed their own settings to fit."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import write_jsonl

from siliang.cli.main import main
from siliang.compare import trials
from siliang.compare.received import IncomingFolder
from siliang.compare.resume import can_resume, changed_settings
from siliang.compare.trials import run_config
from siliang.config import RunConfig
from siliang.config.comparison import CompareConfig
from siliang.records import Predicted, Record
from siliang.tasks import settled
from siliang.train.run import train


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def run(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["siliang", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped, warnings.catch_warnings():
            main()
        out, error = capsys.readouterr()
        assert stopped.value.code == code and "Traceback" not in error, out + error
        return out + error

    return run


def test_a_comparison_goes_on_from_anywhere_and_notices_other_data(
    model_folders: dict[str, Path],
    review_file: Path,
    tmp_path: Path,
    command: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folders["bert"], "base")
    shutil.copy(review_file, "data.jsonl")
    given = ["train.max_steps=2", "data.test_size=0.4", "data.max_length=32", "accept=[SL002, SL003, SL041]"]
    sets = [word for text in given for word in ("--set", text)]
    flags = ("--model", "base", "--data", "data.jsonl", "--task", "seq_cls", "--methods", "bitfit", "--seeds", 1)
    command("compare", *flags, "--output", "out", *sets)
    settings = (tmp_path / "out" / "compare.yaml").read_text()
    assert f"model: {tmp_path / 'base'}\n" in settings and f"train: {tmp_path / 'data.jsonl'}\n" in settings
    (tmp_path / "elsewhere").mkdir()
    shutil.move("out", "elsewhere/moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for way in (["moved/compare.yaml"], ["../elsewhere/moved/compare.yaml"]):
        assert "resumed    1 of 1 runs are completed" in command("compare", *way)
    assert not (tmp_path / "out").exists()
    assert command("eval", "moved/runs/bitfit/seed-42")
    write_jsonl(tmp_path / "data.jsonl", [{"text": f"the film was {w}", "label": w} for w in ("good", "bad") * 20])
    error = command("compare", "moved/compare.yaml", code=2)
    assert "The data has changed since moved was started" in error and "--force" in error
    assert "warning    the data has changed" in command("compare", "moved/compare.yaml", "--force")


def test_what_a_run_changed_to_fit_is_not_another_setting(
    model_folders: dict[str, Path], review_file: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = {
        "model": str(model_folders["bert"]),
        "task": "seq_cls",
        "data": {"train": str(review_file), "max_length": 32},
        "train": {"max_steps": 4, "batch_size": 8, "save_every": 2, "precision": "fp32", "fit": True},
        "output": str(tmp_path / "out"),
        "methods": ["bitfit"],
        "seeds": 1,
    }
    comparison = CompareConfig.build(values)
    config, _ = settled(run_config(comparison, trials.test_trials(comparison, {})[0], tmp_path / "out", {}))

    def smaller(config: RunConfig, *rest: Any) -> tuple[RunConfig, Predicted]:
        half = {"batch_size": 4, "gradient_accumulation": 2}
        return config.model_copy(update={"train": config.train.model_copy(update=half)}), Predicted()

    def plain_plan(config: RunConfig, *rest: Any) -> tuple[RunConfig, Predicted]:
        return config, Predicted()

    record = train(config, planner=smaller)
    folder = Path(config.output)
    assert record.adjusted == {"train.batch_size": 8, "train.gradient_accumulation": 1}
    assert record.config["train"]["batch_size"] == 4
    assert changed_settings(Record.read(folder), config) == {}
    other = RunConfig.build(config.model_dump(mode="json") | {"accept": ["SL001"]})
    assert changed_settings(Record.read(folder), other) == {"accept": ([], ["SL001"])}
    # as one that was interrupted: it goes on as it was, whatever the plan says this time
    record.status = "interrupted"
    record.write(folder)
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    assert can_resume(config) and (folder / "checkpoints" / "checkpoint-2").is_dir()
    again = train(config, resume=True, planner=plain_plan)
    assert again.config["train"]["batch_size"] == 4 and again.adjusted == record.adjusted
    assert again.final == record.final and again.changed == []


def test_a_folder_that_came_back_in_part_is_asked_for_again(tmp_path: Path) -> None:
    incoming = IncomingFolder(tmp_path / "run", 100, "other")
    incoming.receive({"kind": "file", "name": "run.json", "bytes": b"half"})
    incoming.receive({"kind": "folder", "nbytes": 9})
    assert incoming.incomplete and list(tmp_path.iterdir()) == []
    incoming = IncomingFolder(tmp_path / "run", 100, "other")
    incoming.receive({"kind": "file", "name": "run.json", "bytes": b"half and half"})
    incoming.receive({"kind": "folder", "nbytes": 13})
    assert not incoming.incomplete and (tmp_path / "run" / "run.json").read_bytes() == b"half and half"
