"""A comparison's own file against the records of its runs: what does not agree is said in terminal and page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import run
from records import SCORES, comparison

from siliang.records import Comparison, Record
from siliang.report.gather import gather
from siliang.report.page import render
from siliang.report.table import differences
from siliang.report.words import words


def lines(folder: Path) -> list[str]:
    return differences(gather([folder]), words("en"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return comparison(tmp_path / "c", {"full": SCORES["full"], "lora": SCORES["lora"]})


def test_records_that_agree_are_silent(folder: Path) -> None:
    assert lines(folder) == []
    assert "not agree" not in run("report", folder).out + (folder / "report.html").read_text()


CHANGES: list[tuple[Callable[[Record], None], str]] = [
    (lambda r: r.final.update(accuracy=0.9), "accuracy is 0.89 in comparison.json and 0.9 in the run's record"),
    (lambda r: r.final.update(extra=2.5), "extra is – in comparison.json and 2.5 in the run's record"),
    (lambda r: r.final.pop("f1"), "F1 is 0.89 in comparison.json and – in the run's record"),
    (lambda r: setattr(r.parameters, "trained", 9), "trained parameters is 10,000 in comparison.json and 9"),
    (lambda r: setattr(r.parameters, "adapter_bytes", 1), "saved bytes is 40,000 in comparison.json and 1"),
    (lambda r: setattr(r.memory, "peak_bytes", 7), "peak memory in bytes is 400,000,000 in comparison.json and 7"),
    (lambda r: setattr(r.seconds, "train", 1.25), "seconds of training is 60 in comparison.json and 1.25"),
    (lambda r: setattr(r, "seed", 8), "the seed is 0 in comparison.json and 8"),
    (lambda r: r.config["train"].update(seed=8), "the seed is 0 in comparison.json and 8"),
    (lambda r: r.config["train"].update(max_steps=8), "train.max_steps is – in comparison.json and 8"),
    (lambda r: r.config["data"].update(max_length=8), "data.max_length is 512 in comparison.json and 8"),
    (lambda r: r.config["data"].update(seed=8), "data.seed is 1 in comparison.json and 8"),
    (
        lambda r: r.config.update(method={"name": "lora", "r": 64}),
        "the method is lora in comparison.json and lora r=64",
    ),
    (lambda r: r.config.update(method={"name": "ia3"}), "the method is lora in comparison.json and ia3"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_a_run_that_was_changed(change: Callable[[Record], Any], said: str, folder: Path) -> None:
    place = folder / "runs" / "lora" / "seed-0"
    record = Record.read(place)
    change(record)
    record.write(place)
    (line,) = lines(folder)
    assert line.startswith("lora, seed 0: ") and said in line, line


def test_a_comparison_that_was_changed(folder: Path) -> None:
    path = folder / "comparison.json"
    values = json.loads(path.read_text())
    trial = next(t for t in values["trials"] if t["method"] == "lora" and t["seed"] == 2)
    trial["metrics"]["accuracy"] = 0.99
    path.write_text(json.dumps(values))
    assert lines(folder) == ["lora, seed 2: accuracy is 0.99 in comparison.json and 0.91 in the run's record"]
    trial["metrics"] = {}
    path.write_text(json.dumps(values))
    assert len(lines(folder)) == 10  # no metric of the run is in comparison.json


def test_other_data_and_another_base_model(folder: Path) -> None:
    record = Comparison.open(folder / "comparison.json")
    record.model_files = {"config.json": "0" * 64}
    record.save(folder / "comparison.json")
    assert "lora, seed 1: the base model's SHA-256 differs between comparison.json and the run's record" in lines(
        folder
    )


def test_the_learning_rate_that_was_asked_for(folder: Path) -> None:
    path = folder / "comparison.json"
    values = json.loads(path.read_text())
    values["config"]["methods"][1]["learning_rate"] = 0.5
    path.write_text(json.dumps(values))
    assert "lora, seed 0: the learning rate is 0.5 in comparison.json and 0.001 in the run's record" in lines(folder)


def test_a_run_that_is_gone(folder: Path) -> None:
    shutil.rmtree(folder / "runs" / "full" / "seed-1")
    assert lines(folder) == ["full, seed 1: its folder runs/full/seed-1 is missing"]
    shutil.rmtree(folder / "runs")
    ended = run("report", folder)
    assert ended.code == 0 and ended.out.count("is missing") == 6, ended


def test_the_terminal_and_the_page_say_it_in_both_languages(folder: Path) -> None:
    place = folder / "runs" / "lora" / "seed-0"
    record = Record.read(place)
    record.final["accuracy"] = 0.9
    record.write(place)
    shutil.rmtree(folder / "runs" / "full" / "seed-1")
    for w, language, said in (
        (words("en"), "en", "lora, seed 0: accuracy is 0.89 in comparison.json and 0.9 in the run's record"),
        (words("zh"), "zh", "lora，种子 0：准确率在 comparison.json 中是 0.89，在该次运行的记录中是 0.9"),
    ):
        printed = run("report", folder, "--lang", language).out
        page = render(gather([folder]), language=language).replace("&#39;", "'")
        for shown in (printed, page):
            assert w["disagree"].replace("&#39;", "'") in shown and said in shown, shown
            assert "runs/full/seed-1" in shown
