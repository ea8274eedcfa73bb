"""Runs on rows that share their beginnings, with and without computing these once."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_same_losses
from every_task import METHODS, make_models, rated_rows, rows_of
from ranked import start, train_on, weights_of
from tiny import WORDS, write_jsonl

from siliang.config import RunConfig
from siliang.engine import prompt_sharing
from siliang.engine.prompt_sharing import PromptSharing
from siliang.engine.shared_cache import PromptInputs
from siliang.ops.tree_attention import tree_attention
from siliang.records import Answers, Record
from siliang.run_folder import open_run
from siliang.train.log import Progress
from siliang.train.run import train
from siliang.train.types import Listener, Run
from siliang.types import InterruptedRunError
from siliang.use.answers import collect
from siliang.use.evaluate import evaluate
from siliang.use.generate import as_asked, write_texts
from siliang.use.predict_file import predict_file
from siliang.use.sampling import Sampling

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
SYSTEM = " ".join(WORDS[i % 23] for i in range(30))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


def configured(models: dict[str, Path], task: str, data: Path, output: Path, **train_settings: Any) -> RunConfig:
    """Three steps of 8 rows behind a system prompt."""
    rows = rated_rows() if task == "kto" else rows_of(task)
    for row in rows:
        key = "instruction" if task == "causal_lm" else "prompt"
        row[key] = f"{SYSTEM} {row[key]}"
    settings = {"max_steps": 3, "batch_size": 8, "precision": "fp32", "learning_rate": 1e-3, "log_every": 1}
    values = {
        "model": str(models["causal_lm"]),
        "task": "preference" if task == "kto" else task,
        "method": {"name": "lora", "r": 4},
        "data": {"train": str(write_jsonl(data / f"{task}.jsonl", rows)), "test_size": 0.4, "max_length": 64},
        "train": settings | train_settings,
        "preference": {"loss": "kto"} if task == "kto" else None,
        "accept": ["SL042", "SL045"],
        "output": str(output),
    }
    return RunConfig.build(values)


def losses_of(record: Record) -> list[float]:
    return [line.loss for line in record.steps if line.loss is not None]


@pytest.mark.parametrize("task", ["causal_lm", "preference", "kto", "reward"])
def test_a_run_is_that_of_separate_rows(
    task: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return tree_attention(*args, **kwargs)

    monkeypatch.setattr("siliang.ops.packed_attention.tree_attention", counted)
    found, shared = list[Record](), list[int]()
    for share in (True, False):
        found.append(train(configured(models, task, tmp_path, tmp_path / str(share), share_beginnings=share)))
        shared.append(len(calls))
    assert shared[0] >= 2 * 3 and shared[1] == shared[0]  # of two layers
    assert found[0].tokens_trained == found[1].tokens_trained
    assert_same_losses(*map(losses_of, found))
    assert found[0].final == pytest.approx(found[1].final, rel=1e-4, abs=1e-5)
    again = evaluate(open_run(tmp_path / "True"))
    (loss,) = [line.eval_loss for line in found[0].steps if line.eval_loss is not None]
    assert again["loss"] == pytest.approx(loss, rel=1e-6)


def counting_beginnings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each beginning of prompts that is computed once, the trial's not."""
    found: list[int] = []
    compute = PromptInputs.compute_beginning

    def counted(self: PromptInputs, ids: torch.Tensor, kwargs: Any) -> None:
        if ids.shape[1] > 3:
            found.append(ids.shape[1])
        compute(self, ids, kwargs)

    monkeypatch.setattr(PromptInputs, "compute_beginning", counted)
    return found


def refused_on_the_second() -> None:
    """Its trial of shared prompts fails."""
    if os.environ["RANK"] == "1":
        prompt_sharing.find_prompt_sharing = lambda model, pad: PromptSharing("it is of another kind")


def test_ranks_whose_trials_differ_write_the_same_texts(models: dict[str, Path], tmp_path: Path) -> None:
    """Without a shared beginning the batches are others, of which each rank would take its share."""
    systems = (SYSTEM, " ".join(reversed(SYSTEM.split())))
    rows = [row | {"instruction": f"{each} {row['instruction']}"} for row in rows_of("causal_lm") for each in systems]
    data = str(write_jsonl(tmp_path / "two.jsonl", rows))
    found: list[dict[str, float]] = []
    for size in (1, 2):
        config = configured(models, "causal_lm", tmp_path, tmp_path / str(size), max_steps=1, learning_rate=1e-5)
        values = config.model_dump(mode="json")
        values["data"]["train"] = data
        values["train"]["batch_size"] = 4
        values["evaluation"] = {"measures": ["rouge_l", "chrf"], "max_new_tokens": 5}
        children = start(RunConfig.build(values), size, before=refused_on_the_second)
        endings = [child.end() for child in children]
        assert [e.code for e in endings] == [0] * size, endings[-1].output
        final = Record.read(tmp_path / str(size)).final
        found.append({name: final[name] for name in ("rouge_l", "chrf")})
    assert found[0] == found[1] and found[0]["chrf"] > 0


@pytest.mark.parametrize(("method", "rate"), [("lora", 2e-2), ("prefix_tuning", 2e-2), ("full", 2e-3)])
def test_texts_are_those_of_separate_rows(
    method: str, rate: float, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured in training and by eval, greedy and drawn, and each alone."""
    beginnings = counting_beginnings(monkeypatch)
    records, shared = list[Record](), list[int]()
    for share in (True, False):
        config = configured(
            models, "causal_lm", tmp_path, tmp_path / str(share), share_beginnings=share, learning_rate=rate
        )
        values = config.model_dump(mode="json") | {
            "method": METHODS[method],
            "evaluation": {"measures": ["rouge_l", "chrf"], "max_new_tokens": 5},
        }
        records.append(train(RunConfig.build(values)))
        shared.append(len(beginnings))
    assert shared[0] >= 1 and shared[1] == shared[0] and min(beginnings) >= 30
    measures = [{name: record.final[name] for name in ("rouge_l", "chrf")} for record in records]
    assert measures[0] == pytest.approx(measures[1])
    opened = open_run(tmp_path / "True")
    assert evaluate(opened)["chrf"] == records[0].final["chrf"] and len(beginnings) > shared[0]
    asked = [as_asked(opened, f"{SYSTEM} {row['instruction']}") for row in rows_of("causal_lm")]
    for how in (
        Sampling(max_new_tokens=6),
        Sampling(max_new_tokens=6, temperature=0.9, top_p=0.9, repetition_penalty=1.3, seed=5, stop=("film",)),
    ):
        beginnings.clear()
        found = write_texts(opened, asked, how, batch_size=10)
        assert len(beginnings) == 3 and len(set(found)) > 1
        assert found == [write_texts(opened, [one], how, numbers=[i])[0] for i, one in enumerate(asked)]
        assert len(beginnings) == 3
    opened.config.train.share_beginnings = False
    assert found == write_texts(opened, asked, how, batch_size=10) and len(beginnings) == 3


def test_answers_to_a_file_and_to_a_comparison(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beginnings, prompts = counting_beginnings(monkeypatch), [f"{SYSTEM} {word}" for word in WORDS[:4]]

    def ask(run: Run) -> None:
        found = list[Answers]()
        for share in (True, False):
            run.config.train.share_beginnings = share
            found.append(collect(run, prompts, 5))
            if share:
                assert len(beginnings) == 2  # of the prompts, and of some held-out rows
        assert found[0] == found[1] and len(found[0].prompts) == 4 and found[0].rows and len(beginnings) == 2

    train(configured(models, "causal_lm", tmp_path, tmp_path / "run"), Listener(trained=ask))
    beginnings.clear()
    outputs = list[str]()
    for share in (True, False):
        opened = open_run(tmp_path / "run")
        opened.config.train.share_beginnings = share
        source, output = str(tmp_path / "causal_lm.jsonl"), tmp_path / f"{share}.jsonl"
        predict_file(opened, source, output, sampling=Sampling(max_new_tokens=6))
        outputs.append((tmp_path / f"{share}.jsonl").read_text())
    assert outputs[0] == outputs[1] and len(beginnings) == 3


def test_stopped_and_resumed(models: dict[str, Path], tmp_path: Path) -> None:
    whole = train(configured(models, "preference", tmp_path, tmp_path / "whole", max_steps=5))
    stopped: list[int] = []

    def stop(progress: Progress) -> None:
        if progress.step == 2 and not stopped:
            stopped.append(progress.step)
            signal.raise_signal(signal.SIGTERM)

    config = configured(models, "preference", tmp_path, tmp_path / "run", max_steps=5)
    with pytest.raises(InterruptedRunError):
        train(config, Listener(progress=stop))
    assert losses_of(train(config, resume=True)) == losses_of(whole)
    saved = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "run")]
    assert saved[0].read_bytes() == saved[1].read_bytes()


def test_recomputed_or_within_a_budget(models: dict[str, Path], tmp_path: Path) -> None:
    whole = train(configured(models, "causal_lm", tmp_path, tmp_path / "whole"))
    for name, settings in (("all", {"gradient_checkpointing": True}), ("budget", {"memory_budget": "50MB"})):
        assert losses_of(train(configured(models, "causal_lm", tmp_path, tmp_path / name, **settings))) == losses_of(
            whole
        )


@pytest.mark.parametrize(
    ("task", "strategy"),
    [
        ("causal_lm", "ddp"),
        ("preference", "fsdp"),
        pytest.param("causal_lm", "fsdp", marks=pytest.mark.long),
        pytest.param("preference", "ddp", marks=pytest.mark.long),
    ],
)
def test_two_ranks_are_as_one(task: str, strategy: str, models: dict[str, Path], tmp_path: Path) -> None:
    one = configured(models, task, tmp_path, tmp_path / "one")
    record = train(one)
    distributed = one.distributed.model_copy(update={"strategy": strategy})
    two = one.model_copy(update={"output": str(tmp_path / "two"), "distributed": distributed})
    endings = train_on(two, 2)
    assert [e.code for e in endings] == [0, 0], endings[0].output
    other = Record.read(tmp_path / "two")
    assert losses_of(other) == pytest.approx(losses_of(record), rel=1e-5)
    assert other.final == pytest.approx(record.final, rel=1e-4, abs=1e-5)
    found = weights_of(tmp_path / "two")
    for name, value in weights_of(tmp_path / "one").items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5)
