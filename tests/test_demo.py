"""The embedded default: its data, its weights, and that the command tells a story."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from siliang.demo import METHODS, SAMPLES, TEST, TRAIN, encoder_folder
from siliang.types import ModelError


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_enough_reviews_of_both_kinds_and_none_twice() -> None:
    train, test = rows(TRAIN), rows(TEST)
    assert len(train) + len(test) >= 600
    for part in (train, test):
        counts = collections.Counter(row["label"] for row in part)
        assert counts["positive"] == counts["negative"]
    texts = [row["text"].lower() for row in (*train, *test)]
    assert len(set(texts)) == len(texts)


def test_no_single_word_decides() -> None:
    """The best rule of the form "has this word or not" is right on fewer than 60% of the reviews."""
    everything = rows(TRAIN) + rows(TEST)
    bags = [set(row["text"].lower().replace(",", " ").replace(".", " ").split()) for row in everything]
    positive = [row["label"] == "positive" for row in everything]
    for word in set().union(*bags):
        right = sum((word in bag) == is_positive for bag, is_positive in zip(bags, positive, strict=True)) / len(bags)
        assert max(right, 1 - right) < 0.6, word


def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch, encoder: Path) -> None:
    assert (encoder / "config.json").is_file()
    monkeypatch.setattr("siliang.demo.ENCODER_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="not the official file"):
        encoder_folder()


@pytest.mark.slow
def test_the_demo_runs(encoder: Path, tmp_path: Path) -> None:
    code = (
        "import siliang.demo as d; d.TRAINING.update(epochs=0.1); del d.METHODS[1:3], d.METHODS[2:]; "
        "from siliang.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "demo"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    for expected in ("head only", "LoRA", "accuracy", "peak memory", "siliang-demo/report.html", "chat", "compare"):
        assert expected in done.stdout
    page = (tmp_path / "siliang-demo" / "report.html").read_text(encoding="utf-8")
    assert all(text in page for text in SAMPLES)
    assert len(METHODS) >= 4
