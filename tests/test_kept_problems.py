"""Several labels, numbers and ordered classes after the training: resumed to the same bits, opened by PEFT and by
transformers, and trained further as what they are; and many classes."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from every_task import PROBLEMS, configured, make_models
from tiny import WORDS, write_jsonl
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from siliang.config import RunConfig
from siliang.records import Record
from siliang.run_folder import CONFIG_NAME, open_run
from siliang.safety.safe_yaml import read_yaml
from siliang.tasks.labels.calibration import sigmoid, softmax
from siliang.train.log import Progress
from siliang.train.run import train
from siliang.train.start_adapter import filled_in
from siliang.train.types import Listener
from siliang.types import ConfigError, InterruptedRunError
from siliang.use.merge import merge
from siliang.use.predict import predict

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
SETTINGS: dict[str, dict[str, Any]] = {
    "several_labels": {"threshold": 0.3, "class_weights": "balanced"},
    "number": {},
    "ordered": {"problem": "ordered", "min_confidence": 0.25},
}
TRANSFORMERS = {"several_labels": "multi_label_classification", "number": "regression"}
TEXTS = ["the film was good", "we liked it , not the actor", "a"]


def config_of(problem: str, models: dict[str, Path], folder: Path) -> RunConfig:
    config = configured(problem, models, folder, max_steps=3, learning_rate=2e-2, log_every=1)
    return RunConfig.build(config.model_dump(mode="json") | {"classification": SETTINGS[problem]})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", params=PROBLEMS)
def done(request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    train(config_of(request.param, models, folder))
    return folder / "run"


def problem_of(run: Path) -> str:
    return read_yaml(run / CONFIG_NAME)["classification"]["problem"]


def test_it_is_resumed_to_the_same_bits(done: Path, models: dict[str, Path], tmp_path: Path) -> None:
    stopped: list[int] = []

    def stop(progress: Progress) -> None:
        if progress.step == 1 and not stopped:  # a second signal would not wait for the checkpoint
            stopped.append(1)
            signal.raise_signal(signal.SIGTERM)

    config = config_of(problem_of(done), models, tmp_path)
    with pytest.raises(InterruptedRunError):
        train(config, Listener(progress=stop))
    again = train(config, resume=True)
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (done / weights).read_bytes()
    assert again.final == open_run(done).record.final


def test_peft_and_transformers_open_it(done: Path, models: dict[str, Path], tmp_path: Path) -> None:
    problem, run = problem_of(done), open_run(done)
    merge(run, tmp_path / "merged")
    expected = [found.values() for found in predict(run, TEXTS)]
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    config = merged.config
    assert config.problem_type == TRANSFORMERS.get(problem, "single_label_classification")
    assert list(config.id2label.values()) == (run.record.labels or ["LABEL_0"])
    # the adapter alone does not say how many outputs the head has, and this base model has a head of 3
    own = {"problem_type": config.problem_type, "id2label": config.id2label, "ignore_mismatched_sizes": True}
    base = AutoModelForSequenceClassification.from_pretrained(models[problem], **own)
    live = peft.PeftModel.from_pretrained(base, str(done / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for opened in (merged.eval(), live.eval()):
        for text, values in zip(TEXTS, expected, strict=True):
            with torch.no_grad():
                logits = opened(**tokenizer(text, return_tensors="pt")).logits[0].numpy()
            if problem == "number":
                assert values["number"] == pytest.approx(float(logits[0]), abs=1e-5)
            elif problem == "ordered":
                assert values["probability"] == pytest.approx(softmax(logits).max(), abs=1e-4)
            else:
                chances = sigmoid(logits)
                assert values["labels"] == [config.id2label[i] for i in np.flatnonzero(chances >= 0.3)]
                assert values["probabilities"] == pytest.approx(chances[chances >= 0.3].tolist(), abs=1e-4)


def test_an_adapter_is_trained_further_as_what_it_is(done: Path, tmp_path: Path) -> None:
    problem, data = problem_of(done), {"train": str(next(done.parent.glob("*.jsonl"))), "test_size": 0.5}
    values: dict[str, object] = {"adapter": str(done), "data": data, "output": str(tmp_path / "more")}
    settled = RunConfig.build(filled_in(values)).classification
    assert settled is not None and settled.problem == problem
    own = {name: value for name, value in SETTINGS[problem].items() if name in ("threshold", "min_confidence")}
    assert own.items() <= settled.model_dump().items() and settled.class_weights is None  # which is of that data
    if problem == "ordered":
        steps = {"max_steps": 1, "batch_size": 4, "precision": "fp32"}
        record = train(RunConfig.build(filled_in(values | {"train": steps})))
        assert record.classification is not None and record.classification.problem == "ordered"
        assert {"kappa", "coverage"} <= record.final.keys()
    # what the user says comes first, and settings of the other problem are not taken over
    said = RunConfig.build(filled_in(values | {"classification": {"problem": "one_label"}})).classification
    assert said is not None and (said.problem, said.min_confidence) == ("one_label", 0.0)
    other_task = RunConfig.build(filled_in(values | {"task": "embedding"}))
    assert other_task.classification is None


def test_the_loss_of_preferences_is_taken_over(models: dict[str, Path], tmp_path: Path) -> None:
    config = configured("preference", models, tmp_path, max_steps=1)
    train(RunConfig.build(config.model_dump(mode="json") | {"preference": {"loss": "simpo"}}))
    values: dict[str, object] = {"adapter": str(tmp_path / "run"), "data": {"train": "d"}, "output": "o"}
    settled = RunConfig.build(filled_in(values)).preference
    assert settled is not None and (settled.loss, settled.gamma) == ("simpo", 0.5)


def test_many_classes(models: dict[str, Path], tmp_path: Path) -> None:
    """All are learned and have a weight; the report has the most frequent ones."""
    named = [f"c{i}" for i in range(1200)]
    table = [{"text": f"{WORDS[i % 23]} {WORDS[i % 19]}", "label": named[(7 * i) % 1200]} for i in range(30)]
    values = {
        "model": str(models["seq_cls"]),
        "task": "seq_cls",
        "method": "lora",
        "data": {"train": str(write_jsonl(tmp_path / "a.jsonl", table)), "test_size": 0.5, "labels": named},
        "train": {"max_steps": 1, "precision": "fp32"},
        "classification": {"class_weights": "balanced"},
        "accept": ["SL005", "SL019", "SL020", "SL042", "SL047"],
        "output": str(tmp_path / "run"),
    }
    record = train(RunConfig.build(values))
    report, learned = record.class_report, record.classification
    assert report is not None and len(report.classes) == 1000 and sum(c.rows for c in report.classes) == 15
    assert learned is not None and len(learned.class_weights or []) == 1200
    Record.read(tmp_path / "run")
    many = values | {"data": {"train": "a.csv", "labels": [str(i) for i in range(100_001)]}}
    with pytest.raises(ConfigError, match=r"data\.labels has 100,001 names; at most 100,000"):
        RunConfig.build(many)
