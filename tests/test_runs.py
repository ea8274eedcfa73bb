"""A run's folder over time: used from elsewhere, its base model moved or replaced, its data changed, its settings
edited, resumed, and trained further."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import WORDS, write_jsonl

from siliang.cli.main import main
from siliang.data.hashes import base_files
from siliang.files import write_manifest
from siliang.records import Record
from siliang.run_folder import changed_base, open_run
from siliang.run_folder import opened as opening
from siliang.types import ConfigError
from siliang.use.generate import generate
from siliang.use.merge import merge

Command = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command in this process; returns what it printed, its errors and warnings behind."""

    def command(*arguments: object, code: int = 0, stdin: str = "") -> str:
        monkeypatch.setattr(sys, "argv", ["siliang", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped, warnings.catch_warnings():
            main()
        out, error = capsys.readouterr()
        assert stopped.value.code == code, out + error
        assert "Traceback" not in error
        if code == 2:
            assert error.startswith("error[") and error.count("\n") <= 2, error
            return error
        return out + error

    return command


@dataclass
class World:
    """A folder with a base model, data, and a run of six steps on them."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def data(self) -> Path:
        return self.folder / "data.jsonl"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def replace_weights(self) -> None:
        """Other weights, in files of the same size and time."""
        file = self.base / "model.safetensors"
        before = file.stat()
        torch.manual_seed(9)
        weights = {name: t + 0.3 * torch.randn_like(t) for name, t in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
        assert file.stat().st_size == before.st_size
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    def record(self) -> Record:
        return Record.read(self.run)


ROWS = [{"instruction": f"say {w}", "input": "", "output": f"{w} {w}"} for w in WORDS[-24:]]
FLAGS = ("--task", "causal_lm", "--method", "lora")
QUICK = {
    "train.batch_size": 4,
    "train.max_steps": 6,
    "train.save_every": 2,
    "train.learning_rate": 0.01,
    "train.precision": "fp32",
    "data.max_length": 32,
    "train.seed": 3,
}


def sets(**more: object) -> list[str]:
    values = QUICK | {name.replace("__", "."): value for name, value in more.items()}
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def trained(model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world, made with relative names."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(model_folders["llama"], folder / "base")
    write_jsonl(folder / "data.jsonl", ROWS)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped, warnings.catch_warnings():
        patch.chdir(folder)
        flags = ["--model", "base", "--data", "data.jsonl", *FLAGS, "--output", "run", *sets(train__eval_every=4)]
        patch.setattr(sys, "argv", ["siliang", "train", *flags])
        main()
    assert stopped.value.code == 0
    return folder


@pytest.fixture
def world(trained: Path, tmp_path: Path) -> World:
    """A copy of it, to be changed."""
    folder = tmp_path / "world"
    shutil.copytree(trained, folder)
    for name in ("run/run.yaml", "run/run.json"):
        path = folder / name
        path.write_text(path.read_text().replace(str(trained), str(folder)))
    return World(folder)


def test_names_in_a_run_folder_are_absolute(trained: Path) -> None:
    record = Record.read(trained / "run")
    assert record.config["model"] == str(trained / "base")
    assert record.config["data"]["train"] == str(trained / "data.jsonl") == record.data_files[0].path
    assert record.config["output"] == str(trained / "run")
    assert f"model: {trained / 'base'}\n" in (trained / "run" / "run.yaml").read_text()
    adapter = json.loads((trained / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(trained / "base")
    assert set(record.model_files) == {p.name for p in (trained / "base").iterdir()} - {"generation_config.json"}


def test_a_run_works_from_any_folder(
    world: World, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run("eval", world.run, "--json")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(world.run, tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("eval", "moved", "--json") == expected
    assert run("generate", "moved", "say one", "--max-new-tokens", 2)
    assert "verified" in run("merge", "moved", "--output", "merged")
    assert "moved: " in run("chat", "moved", "--max-new-tokens", 2, stdin="say one\n")
    assert "finished   moved was finished before: 6 steps" in run("train", "--resume", "moved")


@pytest.mark.parametrize("precision", ["bf16", "pure-bf16"])
def test_merging_in_fp32_keeps_the_pinned_revision(
    precision: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run in bf16 is loaded again to be merged: from the very revision that it was trained on."""
    for name in ("run.yaml", "run.json"):
        path = world.run / name
        text = path.read_text()
        for before, after in (
            ('"revision": null', '"revision": "abc"'),
            ("revision: null", "revision: abc"),
            ('"precision": "fp32"', f'"precision": "{precision}"'),
            ("precision: fp32", f"precision: {precision}"),
        ):
            text = text.replace(before, after)
        path.write_text(text)
    opened = open_run(world.run)
    assert opened.precision.compute == "bf16" and opened.config.revision == "abc"
    asked: list[str | None] = []
    load = opening.load_model

    def load_model(*arguments: Any, **more: Any) -> Any:
        asked.append(more["revision"])
        return load(*arguments, **more)

    monkeypatch.setattr(opening, "load_model", load_model)
    assert merge(opened, world.folder / "merged").holds
    assert asked == ["abc"]


def test_a_file_that_nothing_loads_makes_no_other_base_model(trained: Path, tmp_path: Path) -> None:
    base = shutil.copytree(trained / "base", tmp_path / "base")
    (base / "notes.txt").write_text("mine")
    was = base_files(str(base))
    assert "notes.txt" not in was and changed_base(str(base), None, was) is None
    for name in (
        "readme.txt",
        "mine.json",
        "adapter_config.json",
        "generation_config.json",
        "pytorch_model.bin",
        "vocab.txt",
        "flax.bin",
    ):
        there = (base / name).exists()
        if not there:
            (base / name).write_text("{}")
        assert changed_base(str(base), None, was) is None, name
    (base / "notes.txt").unlink()
    assert changed_base(str(base), None, was) is None
    for name in ("chat_template.jinja", "added_tokens.json"):
        (base / name).write_text("{}")
        assert changed_base(str(base), None, was) == f"{name} was not there"
        (base / name).unlink()
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    assert changed_base(str(base), None, was) == "model.safetensors is missing"
    was = base_files(str(base))
    (base / "model.safetensors").write_text("")  # which transformers prefers
    assert changed_base(str(base), None, was) == "model.safetensors was not there"


@pytest.mark.parametrize("wanted", [0, -3])
def test_no_fewer_than_one_new_token(wanted: int, trained: Path) -> None:
    with pytest.raises(ConfigError, match=rf"max_new_tokens = {wanted}: must be 1 or more"):
        generate(open_run(trained / "run"), "say one", max_new_tokens=wanted)


USES = (("eval",), ("generate", "say one", "--max-new-tokens", 2), ("merge", "--output", "merged"), ("chat",))


def test_a_base_model_that_was_replaced_is_an_error(
    world: World, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.folder)
    world.replace_weights()
    for name, *more in USES:
        error = run(name, "run", *more, code=2)
        assert "is not the base model that run was trained on: model.safetensors is another file" in error
        assert "--force" in error and "--base" in error
        assert name != "merge" or not Path("merged").exists()
        assert "warning: " in run(name, "run", *more, "--force", stdin="say one\n")
    error = run("train", "--resume", "run", "--set", "train.max_steps=8", code=2)
    assert "has changed since the run started: model.safetensors is another file" in error and "--force" in error
    assert "The run continues, with another result" in run(
        "train", "--resume", "run", "--set", "train.max_steps=8", "--force"
    )
    assert "from step 7 on: the base model" in world.record().changed[-1]


def test_a_classifier_on_another_base_model(
    model_folders: dict[str, Path], review_file: Path, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folders["bert"], "base")
    flags = (
        "--model",
        "base",
        "--data",
        review_file,
        "--task",
        "seq_cls",
        "--output",
        "run",
        *sets(train__max_steps=2),
    )
    run("train", *flags)
    assert run("predict", "run", "the film was good").count("\n") == 1
    vocabulary = Path("base/tokenizer.json")
    vocabulary.write_text(vocabulary.read_text().replace('"good"', '"evil"'))
    assert "tokenizer.json is another file" in run("predict", "run", "the film was good", code=2)
    assert "warning: " in run("predict", "run", "the film was good", "--force")


def test_a_base_model_that_was_moved(world: World, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.folder)
    expected = run("eval", "run", "--json")
    world.base.rename("moved")
    for name, *more in USES:
        error = run(name, "run", *more, code=2)
        assert f"The base model of run is missing: {world.base}. Give its present place with --base" in error
        assert error.count("\n") == 1
        assert name != "merge" or not Path("merged").exists()
        assert "warning" not in run(name, "run", *more, "--base", "moved", stdin="say one\n")
    assert run("eval", "run", "--json", "--base", "moved") == expected
    error = run("train", "--resume", "run", "--set", "train.max_steps=8", code=2)
    assert "Give its present place with --model" in error
    run("train", "--resume", "run", "--set", "train.max_steps=8", "--model", "moved")
    assert world.record().config["model"] == str(world.folder / "moved")
    (Path("moved") / "config.json").write_text((Path("moved") / "config.json").read_text() + " ")
    assert "config.json is another file" in run("eval", "run", "--base", "moved", code=2)


def test_generate_shows_the_base_beside_or_takes_another_place(
    world: World, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.folder)
    short = ("--max-new-tokens", 2)
    assert "tuned:" in run("generate", "run", "say one", "--base", *short)
    assert "tuned:" in run("generate", "run", "--base", "say one", *short)
    world.base.rename("moved")
    assert "tuned:" not in run("generate", "run", "say one", "--base", "moved", *short)
    assert "tuned:" in run("generate", "run", "say one", "--base", "--base=moved", *short)


def test_data_that_has_changed(world: World, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.folder)
    run("eval", "run")
    write_jsonl(world.data, [*ROWS, ROWS[0] | {"instruction": "say a"}])
    error = run("eval", "run", code=2)
    assert f"{world.data} has changed since run was trained" in error and "--data" in error and "--force" in error
    assert "warning: " in run("eval", "run", "--force")
    assert "rows 25" in run("eval", "run", "--data", "data.jsonl")
    error = run("train", "--resume", "run", "--set", "train.max_steps=8", code=2)
    assert "data has changed since the run started" in error and "--force" in error
    assert "verified" in run("merge", "run", "--output", "merged")  # whose proof takes any rows
    world.data.unlink()
    assert f"{world.data} is gone since run was trained" in run("eval", "run", code=2)
    assert "--data" in run("merge", "run", "--output", "again", code=2)
    write_jsonl(world.folder / "other.jsonl", ROWS[:4])
    assert "verified" in run("merge", "run", "--output", "again", "--data", "other.jsonl")


def test_settings_that_are_changed_in_a_finished_run(
    world: World, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.yaml was read again: some of what was changed in it took effect, and some did not, without a word."""
    monkeypatch.chdir(world.folder)
    settings, text = world.run / "run.yaml", (world.run / "run.yaml").read_text()
    expected = run("eval", "run", "--json")
    for old, new, name in (
        ("max_length: 32", "max_length: 8", "data.max_length = 8 (it was 32)"),
        ("name: lora", "name: lora\n  r: 16", "method.r = 16 (it was null)"),
        ("seed: 3", "seed: 4", "train.seed = 4 (it was 3)"),
        ("task: CAUSAL_LM", "task: SEQ_CLS", "task = SEQ_CLS (it was CAUSAL_LM)"),
    ):
        assert old in text
        settings.write_text(text.replace(old, new))
        error = run("eval", "run", code=2)
        assert f"run was trained with another setting: {name}" in error and "Restore it in run/run.yaml" in error
        assert error.count("\n") == 1
    for command, *more in (("generate", "hi"), ("merge", "--output", "merged")):
        assert "another setting: task" in run(command, "run", *more, code=2)
    shutil.copy(world.data, "same.jsonl")
    settings.write_text(text.replace("batch_size: 4", "batch_size: 2").replace("/data.jsonl", "/same.jsonl"))
    assert run("eval", "run", "--json") == expected  # neither shapes what is measured
    write_jsonl(world.folder / "same.jsonl", ROWS[:9])
    assert "same.jsonl is other data" in run("eval", "run", code=2)
    settings.write_text(text)
    world.run.rename("moved")
    assert run("eval", "moved", "--json") == expected


def test_settings_that_are_changed_before_a_resume(world: World, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.folder)
    settings = world.run / "run.yaml"
    text, before = settings.read_text(), (world.run / "adapter" / "adapter_model.safetensors").read_bytes()
    for old, new, name in (
        ("learning_rate: 0.01", "learning_rate: 0.02", "train.learning_rate = 0.02 (it was 0.01)"),
        ("batch_size: 4", "batch_size: 2", "train.batch_size = 2 (it was 4)"),
        ("name: lora", "name: lora\n  r: 16", "method.r = 16 (it was null)"),
        ("seed: 3", "seed: 4", "train.seed = 4 (it was 3)"),
        ("max_length: 32", "max_length: 16", "data.max_length = 16 (it was 32)"),
    ):
        assert old in text
        settings.write_text(text.replace(old, new))
        error = run("train", "--resume", "run", code=2)
        assert f"run was started with another setting: {name}" in error and "--adapter run" in error
    settings.write_text(text.replace("save_every: 2", "save_every: 5"))
    assert "train.save_every = 5 (it was 2) has no effect" in run("train", "--resume", "run", code=2)
    assert (world.run / "adapter" / "adapter_model.safetensors").read_bytes() == before
    settings.write_text(text.replace("max_steps: 6", "max_steps: 4"))
    assert "max_steps = 4, and run/checkpoints/checkpoint-6 has made 6" in run("train", "--resume", "run", code=2)
    changed = text.replace("max_steps: 6", "max_steps: 12").replace("save_every: 2", "save_every: 5")
    settings.write_text(changed.replace("log_every: 10", "log_every: 4").replace("eval_every: 4", "eval_every: 3"))
    out = run("train", "--resume", "run")
    assert "changed    train.max_steps = 12 (it was 6), from step 7 on" in out
    record = world.record()
    assert record.status == "completed" and len(record.changed) == 4
    assert "from step 7 on: train.save_every = 5 (it was 2)" in record.changed
    assert [s.step for s in record.steps if s.loss is not None and s.step > 6] == [8, 12]
    assert [s.step for s in record.steps if s.eval_loss is not None and s.step > 6] == [9, 12]
    assert {p.name for p in (world.run / "checkpoints").iterdir()} == {"checkpoint-10", "checkpoint-12"}


def test_what_resume_says(world: World, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.folder)
    (world.folder / "own.yaml").write_text((world.run / "run.yaml").read_text())
    finished = "finished   run was finished before: 6 steps, nothing is left to do"
    time = world.record().seconds.train
    for way in (["run"], ["run/run.yaml"], ["own.yaml", "--output", "run"]):
        assert finished in run("train", *way, "--resume")
    assert world.record().seconds.train == time
    assert "nothing to resume" in run("train", "own.yaml", "--resume", "--output", "none", code=2)
    assert "give its folder" in run("train", "--resume", code=2)
    assert "leave out --output" in run("train", "run", "--resume", "--output", "other", code=2)
    assert "it holds a finished run" in run("train", "own.yaml", "--output", "run", code=2)
    assert "it holds a finished run" in run("merge", "run", "--output", "run", code=2)
    shutil.rmtree(world.run / "checkpoints")
    error = run("train", "run", "--resume", "--set", "train.max_steps=9", code=2)
    assert "none of its checkpoints is left" in error and "train.max_steps = 9 (it was 6)" in error
    # as one that was killed before its first checkpoint
    record = world.record()
    record.status = "running"
    record.write(world.run)
    shutil.rmtree(world.run / "adapter")
    assert "it holds a run that is not finished" in run("train", "own.yaml", "--output", "run", code=2)
    assert "Choose another" in run("merge", "run", "--output", "run", code=2)
    assert "is not finished (it is running)" in run("eval", "run", code=2)
    out = run("train", "run", "--resume")
    assert "no checkpoint was saved to resume from: the run starts again from its first step" in out
    assert world.record().status == "completed"


def test_a_checkpoint_is_used_as_a_run(world: World, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.folder)
    step = "run/checkpoints/checkpoint-4"
    losses = {s.step: s.eval_loss for s in world.record().steps if s.eval_loss is not None}
    for folder, n in (("run", 6), (step, 4), ("run/checkpoints/checkpoint-6", 6), ("run/adapter", 6)):
        assert json.loads(run("eval", folder, "--json"))["loss"] == pytest.approx(losses[n], rel=1e-5)
    assert losses[4] != pytest.approx(losses[6], rel=1e-5)
    assert run("generate", step, "say one", "--max-new-tokens", 2)
    assert f"{step}: " in run("chat", step, "run", stdin="say one\n")
    assert "verified" in run("merge", step, "--output", "merged")
    for folder, words in (
        ("run/checkpoints", "Name one of its checkpoints, such as run/checkpoints/checkpoint-6"),
        ("run/checkpoints/checkpoint-5", "There is checkpoint-4, checkpoint-6"),
        ("nowhere", "There is no such folder"),
    ):
        assert words in run("eval", folder, code=2)
    shutil.copytree(world.run / "adapter", "alone")
    assert "It holds an adapter alone" in run("eval", "alone", code=2)
    shutil.rmtree(world.run / "adapter")
    assert "use its last checkpoint: run/checkpoints/checkpoint-6" in run("eval", "run", code=2)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_run_that_learned_no_number(
    value: float, world: World, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.folder)
    file = world.run / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "lora_B" in name)
    weights[name].view(-1)[0] = value
    save_file(weights, file, metadata={"format": "pt"})
    write_manifest(world.run / "adapter")
    for command in (("generate", "run", "say film"), ("eval", "run"), ("merge", "run", "--output", "merged")):
        assert "is not finite" in run(*command, code=2)


def test_a_fully_tuned_run_needs_no_base(world: World, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.folder)
    flags = ("--model", "base", "--data", "data.jsonl", "--task", "causal_lm", "--method", "full", "--output", "full")
    run("train", *flags, *sets(train__max_steps=2))
    expected = run("eval", "full", "--json")
    loss = json.loads(run("eval", "full/checkpoints/checkpoint-2", "--json"))["loss"]
    assert loss == pytest.approx(json.loads(expected)["loss"], rel=1e-6)
    shutil.rmtree(world.base)
    assert run("eval", "full", "--json") == expected


def test_every_run_shows_a_loss_and_its_evaluations(trained: Path, run: Command, world: World) -> None:
    record = Record.read(trained / "run")
    assert [s.step for s in record.steps if s.loss is not None] == [6]
    flags = ("--model", world.base, "--data", world.data, *FLAGS, "--output", world.folder / "new")
    out = run("train", *flags, *sets(train__eval_every=2, train__save_every="null")).splitlines()
    assert out[0].startswith("starting ")
    assert [line.split("/")[0].split()[1] for line in out if line.startswith("step") and " loss " in line] == ["1", "6"]
    shown = [line.split() for line in out if line.startswith("step") and "eval_loss" in line]
    assert [words[1].split("/")[0] for words in shown] == ["2", "4", "6"]
    found = [s.eval_loss for s in Record.read(world.folder / "new").steps if s.eval_loss is not None]
    assert [float(words[3]) for words in shown] == pytest.approx(found, abs=5e-5)


FURTHER = ("--data", "new.jsonl", "--output", "further", *sets(train__max_steps=2, train__learning_rate=1e-30))


@pytest.mark.parametrize("given", ["run", "run/adapter", "run/checkpoints/checkpoint-4", "alone"])
def test_an_adapter_is_trained_further(given: str, world: World, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.folder)
    write_jsonl(world.folder / "new.jsonl", [row | {"output": "no"} for row in ROWS])
    shutil.copytree(world.run / "adapter", "alone")
    folder = Path(given) if given != "run" else Path("run/adapter")
    before = {p: p.read_bytes() for p in sorted(Path("run").rglob("*")) if p.is_file()}
    more = ("--set", "data.template=human-assistant") if given == "alone" else ()
    assert f"starts from {given}" in run("train", "--adapter", given, *FURTHER, *more)
    started, ended = (load_file(f / "adapter_model.safetensors") for f in (folder, Path("further/adapter")))
    assert started.keys() == ended.keys() and all(torch.equal(started[name], ended[name]) for name in started)
    record = Record.read(Path("further"))
    assert record.config["adapter"] == str(world.folder / given) and record.config["method"]["name"] == "lora"
    assert record.config["model"] == str(world.base) or given == "alone"  # whose config names the base of the fixture
    assert record.adapter_sha256 is not None
    assert {p: p.read_bytes() for p in before} == before
    shutil.rmtree("further")
    run("train", "--adapter", given, *FURTHER, "--set", "train.learning_rate=0.01", *more)
    ended = load_file("further/adapter/adapter_model.safetensors")
    assert not all(torch.equal(started[name], ended[name]) for name in started)
    assert Record.read(Path("further")).final["eval_loss"] == pytest.approx(
        json.loads(run("eval", "further", "--json"))["loss"], rel=1e-5
    )


def test_an_adapter_of_pefts_is_trained_further(world: World, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(world.folder)
    write_jsonl(world.folder / "new.jsonl", ROWS)
    model = AutoModelForCausalLM.from_pretrained("base")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=["q_proj", "o_proj"], rank_pattern={"o_proj": 2}
    )
    theirs = peft.get_peft_model(model, config)
    torch.manual_seed(5)
    for p in theirs.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    theirs.save_pretrained("theirs")
    run("train", "--adapter", "theirs", *FURTHER)
    method = Record.read(Path("further")).config["method"]
    assert method["name"] == "lora" and (method["r"], method["lora_alpha"], method["rank_pattern"]) == (
        4,
        12,
        {"o_proj": 2},
    )
    started, ended = (load_file(f"{f}/adapter_model.safetensors") for f in ("theirs", "further/adapter"))
    assert started.keys() == ended.keys() and all(torch.equal(started[name], ended[name]) for name in started)
    ids = torch.arange(3, 20)[None]
    opened = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "further/adapter")
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)


def test_an_interrupted_run_from_an_adapter_goes_on_without_it(
    world: World, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.folder)
    write_jsonl(world.folder / "new.jsonl", ROWS)
    flags = ("--adapter", "old", "--data", "new.jsonl", *sets())
    world.run.rename("old")
    run("train", *flags, "--output", "whole")
    run("train", *flags, "--output", "cut", "--set", "train.max_steps=4")
    shutil.rmtree("old")
    out = run("train", "--resume", "cut", "--set", "train.max_steps=6", "--set", "train.epochs=3")
    assert "from step 5 on" in out
    assert Record.read(Path("cut")).adapter_sha256 == Record.read(Path("whole")).adapter_sha256


def test_what_cannot_be_trained_further(world: World, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.folder)
    write_jsonl(world.folder / "new.jsonl", ROWS)
    Path("empty").mkdir()
    for flags, words in (
        (["--adapter", "nowhere/at/all"], "There is no adapter folder"),
        (["--adapter", "empty"], "holds no adapter"),
        (["--adapter", "run", "--method", "ia3"], "method.name = 'ia3', and the adapter in run/adapter has 'lora'"),
        (["--adapter", "run", "--set", "method.r=16"], "method.r = 16, and the adapter in run/adapter has 8"),
    ):
        assert words in run("train", *flags, *FURTHER, code=2)
        assert not Path("further").exists()
    shutil.copytree("run", "stopped", ignore=shutil.ignore_patterns("adapter"))
    error = run("train", "--adapter", "stopped", *FURTHER, code=2)
    assert "stopped was not finished: name one of its checkpoints, such as stopped/checkpoints/checkpoint-6." in error
    shutil.rmtree("stopped/checkpoints")
    assert "was not finished, and has no checkpoint" in run("train", "--adapter", "stopped", *FURTHER, code=2)
    world.replace_weights()
    error = run("train", "--adapter", "run", *FURTHER, code=2)
    assert "is not the base model that run was trained on: model.safetensors is another file" in error
    assert not Path("further").exists()
    run("train", "--adapter", "run", *FURTHER, "--force")


def test_a_classifier_keeps_its_classes(
    model_folders: dict[str, Path], review_file: Path, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = sets(train__max_steps=2)
    flags = ("--model", model_folders["bert"], "--data", review_file, "--task", "seq_cls", "--output", "first", *short)
    run("train", *flags, "--set", "data.labels=[pos, neg]")
    run("train", "--adapter", "first", "--data", review_file, "--output", "second", *short)
    assert Record.read(Path("second")).labels == ["pos", "neg"]
    rows = [{"text": "the film was slow", "label": "slow"}, {"text": "the film was good", "label": "pos"}] * 8
    write_jsonl(tmp_path / "other.jsonl", rows)
    error = run("train", "--adapter", "first", "--data", "other.jsonl", "--output", "third", *short, code=2)
    assert "has the label 'slow', which is not one of pos, neg" in error
