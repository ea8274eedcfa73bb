"""Runs that learn from pairs: stopped and resumed, planned, and used."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run as run_command
from every_task import configured, make_models, rated_rows
from safetensors.torch import load_file
from tiny import write_jsonl

from siliang.config import PreferenceConfig, RunConfig
from siliang.engine.reference_store import ReferenceStore
from siliang.plan.preflight import Planner
from siliang.records import Record
from siliang.run_folder import open_run
from siliang.tasks import EntryValues
from siliang.tasks.preference import measure
from siliang.tasks.reward import Reward
from siliang.train.run import train
from siliang.train.saving import read_state
from siliang.train.types import Listener, Progress
from siliang.types import ConfigError, InterruptedRunError
from siliang.use.evaluate import evaluate
from siliang.use.generate import generate
from siliang.use.predict import predict

STEPS = 9  # of 11 rows in steps of 4: the third epoch has begun


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


def losses(record: Record) -> list[float]:
    return [line.loss for line in record.steps if line.loss is not None]


@pytest.mark.parametrize(
    ("task", "method"),
    [("preference", "lora"), ("preference", "full"), ("kto", "lora"), ("kto", "full"), ("reward", "lora")],
)
def test_stopped_in_the_second_epoch_and_resumed_to_the_same_bits(
    task: str, method: str, models: dict[str, Path], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"max_steps": STEPS, "log_every": 1, "learning_rate": 5e-3}
    weights = "adapter/adapter_model.safetensors" if method == "lora" else "model/model.safetensors"
    planner = Planner()
    for part in ("whole", "parts"):
        (tmp_path / part).mkdir()
    whole = train(configured(task, models, tmp_path / "whole", method, **settings), planner=planner)
    assert planner.last_plan is not None and planner.last_plan.trained == whole.parameters.trained
    saved = tmp_path / "whole" / "run" / weights
    assert planner.last_plan.adapter_bytes == sum(t.nbytes for t in load_file(saved).values())

    stopped: list[int] = []

    def stop(progress: Progress) -> None:
        if progress.step == 5 and not stopped:
            stopped.append(progress.step)
            signal.raise_signal(signal.SIGTERM)

    config = configured(task, models, tmp_path / "parts", method, **settings)
    with pytest.raises(InterruptedRunError):
        train(config, Listener(progress=stop))
    state = read_state(tmp_path / "parts" / "run" / "checkpoints" / "checkpoint-6")
    assert (state["reference"] is not None) == (task != "reward")
    if task != "reward":
        rows = 11 if method == "lora" else 23  # seen so far; of all rows, held-out ones too, where there is no adapter
        assert len(state["reference"]["keys"]) == 2 * rows
        again = ReferenceStore()
        again.load_state_dict(state["reference"])
        assert again.state_dict()["values"].equal(state["reference"]["values"])
    resumed = train(config, resume=True)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == STEPS
    assert (tmp_path / "parts" / "run" / weights).read_bytes() == saved.read_bytes()
    assert resumed.final == whole.final
    found = evaluate(open_run(tmp_path / "whole" / "run"))
    assert {name: found[name] for name in whole.final if name in found} == {
        name: value for name, value in whole.final.items() if name in found
    }


def test_a_run_that_learned_preferences_writes(models: dict[str, Path], tmp_path: Path) -> None:
    train(configured("preference", models, tmp_path))
    assert isinstance(generate(open_run(tmp_path / "run"), "one two", up_to=4), str)


def test_a_reward_model_rewards_answers(models: dict[str, Path], tmp_path: Path) -> None:
    config = configured("reward", models, tmp_path, max_steps=60, batch_size=8, learning_rate=2e-2)
    record = train(config)
    assert losses(record)[-1] < 0.3
    run = open_run(tmp_path / "run")
    row = json.loads((tmp_path / "reward.jsonl").read_text().splitlines()[0])
    better, worse = predict(run, [(row["prompt"], row[part]) for part in ("chosen", "rejected")])
    assert isinstance(better, Reward) and isinstance(worse, Reward)
    assert better.prompt == row["prompt"] and better.reward > worse.reward
    turns = [{"role": "user", "content": row["prompt"]}]
    asked = [
        {"prompt": row["prompt"], "answer": row["chosen"]},
        {"prompt": turns, "answer": [{"role": "assistant", "content": row["chosen"]}]},
        {"prompt": row["prompt"], "answer": ""},
    ]
    ended = run_command("predict", tmp_path / "run", write_jsonl(tmp_path / "asked.jsonl", asked), "--json")
    assert ended.code == 0, ended
    told = [json.loads(line)["reward"] for line in ended.out.splitlines()]
    assert told == [pytest.approx(better.reward, abs=1e-4), pytest.approx(better.reward, abs=1e-4), None]


@pytest.mark.parametrize("loss", ["sigmoid", "orpo", "kto"])
def test_losses_do_not_depend_on_how_a_step_is_cut(loss: str, models: dict[str, Path], tmp_path: Path) -> None:
    found: list[list[float]] = []
    for batch_size in (4, 1):
        (folder := tmp_path / str(batch_size)).mkdir()
        cut: dict[str, Any] = {"batch_size": batch_size, "gradient_accumulation": 4 // batch_size}
        task = "kto" if loss == "kto" else "preference"
        config = configured(task, models, folder, max_steps=6, log_every=1, learning_rate=5e-3, **cut)
        values = config.model_dump(mode="json") | {"preference": {"loss": loss}}
        found.append(losses(train(type(config).build(values))))
    assert found[0] == pytest.approx(found[1], rel=1e-5) and len(set(found[0])) > 4


@pytest.mark.parametrize("method", [{"name": "lora", "init_lora_weights": "pissa"}, {"name": "prefix_tuning"}])
def test_the_reference_is_the_base_model(method: dict[str, str], models: dict[str, Path], tmp_path: Path) -> None:
    """PiSSA changes the base weights, and begins with what they were; a prefix begins with another model."""
    config = configured("preference", models, tmp_path, log_every=1)
    values = config.model_dump(mode="json") | {"method": method}
    first = losses(train(type(config).build(values)))[0]
    starts_as_the_base = "init_lora_weights" in method
    assert (first == pytest.approx(math.log(2), abs=2e-6)) == starts_as_the_base


def test_an_adapter_is_no_base_to_compare_with(models: dict[str, Path], tmp_path: Path) -> None:
    values = configured("preference", models, tmp_path).model_dump(mode="json") | {"adapter": "a"}
    with pytest.raises(ConfigError, match="Merge it"):
        RunConfig.build(values)
    assert RunConfig.build(values | {"preference": {"loss": "simpo"}}).preference is not None


def test_defaults_are_those_of_the_loss() -> None:
    for loss, beta, gamma, nll_weight in (
        ("sigmoid", 0.1, None, 0.0),
        ("simpo", 2.0, 0.5, 0.0),
        ("orpo", 0.1, None, 1.0),
    ):
        found = PreferenceConfig.model_validate({"loss": loss})
        assert (found.beta, found.gamma, found.nll_weight) == (beta, gamma, nll_weight)
        assert PreferenceConfig.model_validate(found.model_dump()) == found


def test_two_equal_rewards_are_half_right() -> None:
    kept = {
        i: EntryValues(torch.tensor([[a, 1.0], [b, 1.0]]), torch.zeros(2, 2))
        for i, (a, b) in enumerate([(1, 1), (2, 1)])
    }
    found = measure(PreferenceConfig(), kept, None)  # type: ignore[arg-type]  # which is not read
    assert found["accuracy"] == 0.75


def test_a_section_of_another_task_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    values = configured("causal_lm", models, tmp_path).model_dump(mode="json")
    with pytest.raises(ConfigError, match="is a section of the task preference"):
        type(configured("causal_lm", models, tmp_path)).build(values | {"preference": {"loss": "ipo"}})


@pytest.mark.parametrize(("good", "absent"), [(True, "rejected_reward"), (False, "chosen_reward")])
def test_no_figure_of_a_kind_of_answer_that_is_not_there(
    good: bool, absent: str, models: dict[str, Path], tmp_path: Path
) -> None:
    config = configured("kto", models, tmp_path, max_steps=1)
    train(config)
    rows = [row for row in rated_rows() if row["label"] is good]
    held_out = write_jsonl(tmp_path / "one_kind.jsonl", rows)
    found = evaluate(open_run(Path(config.output)), str(held_out))
    assert {"accuracy", "kl"} < found.keys() and not {"margin", absent} & found.keys()
    assert {"chosen_reward", "rejected_reward"} - {absent} <= found.keys()
    ended = run_command("eval", config.output, "--data", held_out)
    assert "not measured: margin, for which these rows are not enough" in ended.err and "margin" not in ended.out
    alone = write_jsonl(tmp_path / "alone.jsonl", rows[:1])  # no other prompt, whose answers z is the mean of
    assert "kl" not in evaluate(open_run(Path(config.output)), str(alone))


def test_best_by_a_figure_that_accepted_rows_do_not_have(models: dict[str, Path], tmp_path: Path) -> None:
    config = configured("kto", models, tmp_path, max_steps=2, eval_every=1, best="margin")
    bad = [row for row in rated_rows() if not row["label"]]
    config.data.eval = str(write_jsonl(tmp_path / "bad.jsonl", bad))
    config = type(config).build(config.model_dump(mode="json") | {"accept": ["SL049"]})
    record = train(config)
    assert record.best_step is None and "margin" not in record.final
