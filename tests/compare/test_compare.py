"""A whole comparison as its user runs it: killed, gone on with, and each of its runs the same as on its own."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import termios
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import WORDS, write_jsonl

from siliang.cli.main import main
from siliang.compare.base import CachedBase, checksums
from siliang.compare.pool import Pool
from siliang.compare.run import CompareListener, compare
from siliang.config import RunConfig
from siliang.config.comparison import CompareConfig
from siliang.models.tokenizers import load_tokenizer
from siliang.records import Answers, Comparison, Record, Trial
from siliang.run_folder import load_base
from siliang.train.run import train
from siliang.train.types import Listener
from siliang.types import InterruptedRunError

pytestmark = pytest.mark.slow  # each worker and each command imports torch anew
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "siliang", *map(str, arguments)]


def siliang(*arguments: object) -> str:
    """Runs a command in a process of its own; returns its output."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, env=ENV)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout


def in_terminal(*arguments: object, typed: str, rows: int, columns: int) -> str:
    """Runs a command with a terminal of that size around it; returns all that is written to that."""
    ours, its = os.openpty()
    termios.tcsetwinsize(its, (rows, columns))
    env = {k: v for k, v in ENV.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm-256color"}
    with subprocess.Popen(
        command(*arguments), stdin=its, stdout=its, stderr=its, env=env, start_new_session=True
    ) as run:
        os.close(its)
        os.write(ours, typed.encode())
        shown = b""
        with contextlib.suppress(OSError):  # EIO is how a terminal says that nobody writes to it any more
            while part := os.read(ours, 65536):
                shown += part
    os.close(ours)
    assert run.returncode == 0, shown
    return shown.decode()


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command in this process, which has the slow imports behind it, as `siliang` does in its own."""

    def run(*arguments: object, code: int = 0, stdin: str = "") -> str:
        monkeypatch.setattr(sys, "argv", ["siliang", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped, warnings.catch_warnings():
            main()
        out, error = capsys.readouterr()
        assert stopped.value.code == code, out + error
        assert "Traceback" not in error
        return error if code == 2 else out

    return run


METHODS = [
    {"name": "full", "learning_rate": 3e-3},
    {"name": "full", "label": "collapsed", "learning_rate": 30.0},
    {"name": "lora", "learning_rate": 1e-2},
    {"name": "bitfit", "learning_rate": 1e-2},
    {"name": "prompt", "num_virtual_tokens": 4, "label": "prompt"},
    {"name": "ia3", "label": "lost", "target_modules": ["nowhere"]},
]


@pytest.fixture(scope="module")
def settings(model_folders: dict[str, Path], review_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "compare.yaml"
    values = {
        "model": str(model_folders["bert"]),
        "task": "seq_cls",
        "data": {"train": str(review_file), "test_size": 0.4, "max_length": 32},
        "train": {"epochs": 6, "batch_size": 8, "log_every": 2},
        "accept": ["SL002", "SL003"],
        "methods": METHODS,
        "seeds": 2,
        "prompts": ["the film was good", "the film was dull"],
        "output": str(path.parent / "out"),
    }
    path.write_text(yaml.safe_dump(values))
    return path


def its_worker(process: psutil.Process) -> bool:
    """Whether a process is a worker of this test process's comparisons."""
    try:
        return {sys.executable, "siliang.compare.worker"} <= set(process.cmdline())
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def killed_then_finished(settings: Path) -> tuple[Path, dict[str, str], str]:
    """(the comparison's folder, when the runs before the kill were begun, what the second command printed)."""
    folder = settings.parent / "out"
    with subprocess.Popen(command("compare", settings), stdout=subprocess.PIPE, text=True, env=ENV) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if re.match(r" +4/12 ", line):
                break
        until = time.monotonic() + 20  # on a busy machine the next worker may not have begun
        while not (workers := [p for p in psutil.process_iter() if its_worker(p)]) and time.monotonic() < until:
            time.sleep(0.05)
        process.kill()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert len(workers) == 1 and not alive  # nobody trains on into a folder that is somebody else's now
    done = [t for t in Comparison.open(folder / "comparison.json").trials if t.status == "completed"]
    before = {t.folder: (folder / t.folder / "run.json").read_text() for t in done}
    assert len(before) == 3
    return folder, before, siliang("compare", settings)


def test_killed_and_gone_on(killed_then_finished: tuple[Path, dict[str, str], str], here: Callable[..., str]) -> None:
    folder, before, printed = killed_then_finished
    comparison = Comparison.open(folder / "comparison.json")
    assert comparison.status == "completed"
    assert {t.folder: t.attempts for t in comparison.trials if t.folder in before} == dict.fromkeys(before, 1)
    assert all((folder / run / "run.json").read_text() == text for run, text in before.items())
    assert "resumed    3 of 12 runs are completed" in printed
    assert {t.status for t in comparison.trials if t.method != "lost"} == {"completed"}
    # once more: only what failed is tried again
    again = here("compare", folder / "compare.yaml")
    assert len(re.findall(r"^ +\d+/12 ", again, re.MULTILINE)) == 2 and "10 of 12 runs are completed" in again


@pytest.mark.parametrize("way", ["Ctrl-C", "SIGKILL"])
def test_an_interrupted_run_goes_on_from_where_it_was(
    way: str, model_folders: dict[str, Path], review_file: Path, tmp_path: Path
) -> None:
    """Ctrl-C has the worker save a checkpoint; a worker that is killed has those of train.save_every."""

    def config(name: str) -> CompareConfig:
        values = {
            "model": str(model_folders["bert"]),
            "task": "seq_cls",
            "data": {"train": str(review_file), "test_size": 0.4, "max_length": 32},
            "train": {"max_steps": 60, "batch_size": 4, "log_every": 5, "save_every": 10 if way == "SIGKILL" else None},
            "accept": ["SL002", "SL003"],
            "methods": [{"name": "lora", "learning_rate": 1e-2}],
            "seeds": 1,
            "output": str(tmp_path / name),
        }
        return CompareConfig.build(values)

    def interrupt(trial: Trial, progress: dict[str, Any]) -> None:
        if progress["step"] == 25:
            for child in psutil.Process().children() if way == "SIGKILL" else []:
                child.kill()
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError):
        compare(config("cut"), CompareListener(progress=interrupt))
    steps: list[int] = []
    compare(config("cut"), CompareListener(progress=lambda trial, p: steps.append(p["step"])))
    assert min(steps) >= 20
    compare(config("whole"))
    whole, cut = (Record.read(tmp_path / name / "runs" / "lora" / "seed-42") for name in ("whole", "cut"))
    assert cut.final == whole.final
    losses = [[s.loss for s in record.steps] for record in (whole, cut)]
    assert losses[0] == losses[1] and len(losses[0]) > 10
    assert Comparison.open(tmp_path / "cut" / "comparison.json").trials[0].status == "completed"


def test_each_run_is_that_of_its_own_command(
    killed_then_finished: tuple[Path, dict[str, str], str], tmp_path: Path
) -> None:
    """To the last bit, weights and losses, though the base model was loaded for other runs before."""
    folder, _, _ = killed_then_finished
    for name in ("lora", "bitfit", "prompt", "full"):
        run = folder / "runs" / name / "seed-43"
        config = RunConfig.build(yaml.safe_load((run / "run.yaml").read_text()))
        alone = tmp_path / name
        if name == "bitfit":
            siliang("train", run / "run.yaml", "--output", alone)
            record = Record.read(alone)
        else:
            record = train(config.model_copy(update={"output": str(alone)}))
        there = Record.read(run)
        assert record.final == there.final, name
        assert [s.loss for s in record.steps] == [s.loss for s in there.steps]
        file = "model/model.safetensors" if name == "full" else "adapter/adapter_model.safetensors"
        a, b = load_file(run / file), load_file(alone / file)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


def test_initializations_of_lora_leave_the_base_model_as_it_was(
    model_folders: dict[str, Path], review_file: Path, tmp_path: Path, here: Callable[..., str]
) -> None:
    """PiSSA changes the base weights, EVA reads training rows: the runs beside them are those of their own commands."""
    settings = {
        "model": str(model_folders["bert"]),
        "task": "seq_cls",
        "data": {"train": str(review_file), "test_size": 0.4, "max_length": 32},
        "train": {"max_steps": 4, "batch_size": 4, "log_every": 1},
        "accept": ["SL002", "SL003"],
        "methods": [
            *({"name": "lora", "label": start, "init_lora_weights": start} for start in ("pissa", "eva")),
            {"name": "lora", "label": "plain"},
        ],
        "seeds": 1,
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(settings))
    here("compare", tmp_path / "compare.yaml")
    losses = {}
    for label in ("pissa", "eva", "plain"):
        run = tmp_path / "out" / "runs" / label / "seed-42"
        config = RunConfig.build(yaml.safe_load((run / "run.yaml").read_text()))
        alone, there = train(config.model_copy(update={"output": str(tmp_path / label)})), Record.read(run)
        losses[label] = [s.loss for s in there.steps]
        assert losses[label] == [s.loss for s in alone.steps] and alone.final == there.final, label
    assert len({tuple(line) for line in losses.values()}) == 3


def test_the_table_says_all(killed_then_finished: tuple[Path, dict[str, str], str]) -> None:
    folder, _, printed = killed_then_finished
    head, *rows = printed[printed.index("\nmethod") :].strip().splitlines()
    assert "accuracy" in head and "trained" in head and "train tokens/s" in head
    table = {row.split()[0]: row for row in rows[: len(METHODS)]}
    assert list(table) == ["full", "collapsed", "lora", "bitfit", "prompt", "lost"]
    assert "±" in table["lora"] and "failed" in table["lost"]
    assert "collapsed: learned nothing: predicts only one class" in printed
    assert "lost: seed 42, 43: SL024" in printed and "'nowhere' matches no module" in printed
    assert "Always predicting the most frequent class gives accuracy" in printed
    splits = set()
    for run in (folder / "runs").glob("*/*/answers.json"):
        answers = Answers.open(run)
        assert [a.input for a in answers.prompts] == ["the film was good", "the film was dull"]
        splits.add(tuple(a.where for a in answers.rows))
    assert len(splits) == 1  # the same held-out rows for every method and seed
    assert (folder / "report.html").stat().st_size > 10_000


def test_the_runs_are_runs(killed_then_finished: tuple[Path, dict[str, str], str], here: Callable[..., str]) -> None:
    runs = killed_then_finished[0] / "runs"
    record = Record.read(runs / "lora" / "seed-42")
    assert json.loads(here("eval", runs / "lora" / "seed-42", "--json"))["accuracy"] == record.final["accuracy"]
    said = here("chat", runs / "lora" / "seed-42", runs / "full" / "seed-42", stdin="the film was good\n")
    lines = said.strip().splitlines()
    assert lines[0] == "> the film was good" and len(lines) == 3
    expected = here("predict", runs / "lora" / "seed-42", "the film was good").split("\t")
    assert lines[1] == f"{runs / 'lora' / 'seed-42'}: {expected[0]} ({expected[1]})"
    page = runs.parent / "two.html"
    here("report", runs / "lora" / "seed-42", runs / "bitfit" / "seed-42", "--output", page, "--lang", "zh")
    assert "bitfit" in page.read_text() and "collapsed" not in page.read_text()


def test_wrong_input(
    killed_then_finished: tuple[Path, dict[str, str], str],
    settings: Path,
    tmp_path: Path,
    here: Callable[..., str],
) -> None:
    folder = killed_then_finished[0]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    cases: list[tuple[list[object], str]] = [
        (["compare", settings, "--methods", "lora,bitfti"], "Did you mean 'bitfit'"),
        (["compare", settings, "--methods", "lora,lora"], "'lora' twice"),
        (["compare", settings, "--set", "method=lora"], "has `methods`"),
        (["compare", settings, "--set", "seed=3"], "seed is not a setting. Did you mean 'seeds'"),
        (["compare", settings, "--set", "search.lerning_rate=[1]"], "Did you mean 'learning_rate'"),
        (["compare", settings, "--set", "train.epochs=2"], f"{folder} holds a comparison with another train.epochs"),
        (["compare", settings, "--output", tmp_path / "full"], "is not empty"),
        (["compare", settings, "--lang", "fr"], "must be en or zh"),
        (["compare", settings, "--output", tmp_path / "new", "--set", "data.test_size=0"], "held-out rows"),
        (["compare", settings, "--output", tmp_path / "new", "--data", tmp_path / "none.csv"], "no data file"),
        (["report", tmp_path], "is not a run's folder"),
        (["report", folder, "--output", tmp_path / "no" / "page.html"], "give a file name in an existing folder"),
        (["chat", folder], "is not a run's folder"),
    ]
    for arguments, message in cases:
        error = here(*arguments, code=2)
        assert message in error and error.startswith("error[") and error.count("\n") <= 2, error
    assert not (tmp_path / "new").exists()


def test_search_sees_validation_rows_alone(
    model_folders: dict[str, Path], instruction_file: Path, tmp_path: Path, here: Callable[..., str]
) -> None:
    """On a model that writes: the base is measured, settings are chosen, two workers share the runs."""
    out = tmp_path / "out"
    flags = ["--model", model_folders["llama"], "--data", instruction_file, "--task", "causal_lm", "--output", out]
    sets = [
        "data.max_length=32",
        "data.test_size=0.2",
        "train.max_steps=6",
        "train.batch_size=4",
        "search={learning_rate: [0.000001, 0.01], r: [2, 4]}",
        "validation_size=0.25",
        "max_new_tokens=4",
        "accept=[SL041]",
    ]
    given = [part for text in sets for part in ("--set", text)]
    printed = here("compare", *flags, "--methods", "lora,bitfit,prompt", "--seeds", 1, "--jobs", 2, *given)
    assert ("--jobs 2 on 1 threads" in printed) == (torch.get_num_threads() == 1 and not torch.cuda.is_available())
    comparison = Comparison.open(out / "comparison.json")
    searched = [t for t in comparison.trials if t.purpose == "search"]
    assert len(searched) == 4 + 2 + 2
    for trial in searched:
        if trial.method != "bitfit":
            record = Record.read(out / trial.folder)
            assert (record.rows.train, record.rows.eval) == (12, 4)
            assert not (out / trial.folder / "adapter").exists()
    chosen = Record.read(out / "runs" / "lora" / "seed-42")
    assert (chosen.rows.train, chosen.rows.eval) == (16, 4)
    losses = {
        json.dumps(t.settings): Record.read(out / t.folder).final["eval_loss"] for t in searched if t.method == "lora"
    }
    assert json.dumps(comparison.chosen["lora"]) == min(losses, key=lambda key: losses[key])
    assert chosen.learning_rate == comparison.chosen["lora"]["learning_rate"] == 0.01
    assert "bitfit: seed 42: SL025" in printed  # Llama has no biases
    base = Answers.open(out / "base" / "answers.json")
    tuned = Answers.open(out / "runs" / "lora" / "seed-42" / "answers.json")
    assert [a.input for a in base.rows] == [a.input for a in tuned.rows] and len(base.rows) == 4
    assert comparison.base["eval_loss"] > chosen.final["eval_loss"]
    assert f"{comparison.base['eval_loss']:.4f}" in printed
    question = base.rows[0].input
    said = here("chat", out / "runs" / "lora" / "seed-42", "--max-new-tokens", 4, stdin=f"{question}\n")
    assert f"base: {base.rows[0].predicted}\n" in said
    assert f"{out / 'runs' / 'lora' / 'seed-42'}: {tuned.rows[0].predicted}\n" in said
    runs = [out / "runs" / name / "seed-42" for name in ("lora", "prompt_tuning")]
    shown = in_terminal("chat", *runs, "--max-new-tokens", 80, typed=f"{question}\n\n", rows=8, columns=60)
    assert shown.count("base") >= 1 and runs[1].name in shown
    redrawn = re.findall(r"(?:\x1b\[1A\x1b\[2K)+", shown)
    heights = [part.count("\x1b[1A") for part in redrawn]
    assert max(heights) == 6  # lines above the last of a frame: what has left the terminal is not drawn over


def test_answers_in_a_context(model_folders: dict[str, Path], tmp_path: Path, here: Callable[..., str]) -> None:
    """Contexts longer than a window, two right answers to some questions; what the page shows is what was measured."""
    rows = []
    for i, word in enumerate(WORDS[:40]):
        context = f"hello world {word} ! ? yes " + "no " * (i % 5) + f"say {word} ?"
        right = [word, f"say {word}"][: 2 if i % 3 else 1]
        answers = {"text": right, "answer_start": [context.index(text) for text in right]}
        rows.append({"context": context, "question": "say !", "answers": answers})
    flags = ["--model", model_folders["bert"], "--data", write_jsonl(tmp_path / "d.jsonl", rows), "--seeds", 1]
    flags += ["--task", "question_ans", "--methods", "full,bitfit", "--output", tmp_path / "out"]
    sets = ["data.max_length=14", "data.stride=2", "data.test_size=0.4", "train.max_steps=60", "accept=[SL002,SL042]"]
    here("compare", *flags, *(part for text in sets for part in ("--set", text)))
    page = (tmp_path / "out" / "report.html").read_text()
    for method in ("full", "bitfit"):
        run = tmp_path / "out" / "runs" / method / "seed-42"
        said = Answers.open(run / "answers.json").rows
        assert len(said) == 16 and all(a.input.startswith("say !\n") for a in said)
        assert any(a.expected and " / " in a.expected for a in said)
        share = sum(bool(a.correct) for a in said) / len(said)
        assert share == pytest.approx(Record.read(run).final["exact_match"])
        assert f"{method}: {sum(not a.correct for a in said)} " in page


def test_minutes_become_steps(
    model_folders: dict[str, Path], review_file: Path, tmp_path: Path, here: Callable[..., str]
) -> None:
    flags = ["--model", model_folders["bert"], "--data", review_file, "--task", "seq_cls", "--output", tmp_path / "o"]
    here("compare", *flags, "--methods", "lora", "--seeds", 1, "--set", "minutes=0.02", "--set", "accept=[SL002]")
    comparison = Comparison.open(tmp_path / "o" / "comparison.json")
    record = Record.read(tmp_path / "o" / "runs" / "lora" / "seed-42")
    assert record.config["train"]["max_steps"] == comparison.steps["lora"] > 1
    assert not (tmp_path / "o" / "timing").exists()


def test_a_killed_worker_is_one_lost_run(model_folders: dict[str, Path], review_file: Path, tmp_path: Path) -> None:
    def request(name: str) -> dict[str, Any]:
        values = {
            "model": str(model_folders["bert"]),
            "task": "seq_cls",
            "data": {"train": str(review_file)},
            "train": {"max_steps": 300 if name == "long" else 2, "batch_size": 4},
            "output": str(tmp_path / name),
        }
        config = RunConfig.build(values).model_dump(mode="json")
        return {"kind": "train", "config": config, "prompts": [], "max_new_tokens": 4, "resume": False}

    ended = {}
    with Pool(1, tmp_path / "logs") as pool:
        for event in pool.run([request("long"), request("short")]):
            if event.kind == "progress" and event.number == 0:
                for child in psutil.Process().children():
                    with contextlib.suppress(psutil.ZombieProcess):  # killed at an earlier word of progress
                        if "siliang.compare.worker" in child.cmdline():
                            child.send_signal(signal.SIGKILL)
            if event.kind in ("done", "failed", "died"):
                ended[event.number] = (event.kind, event.message.get("error", ""))
    assert ended[0][0] == "died" and "memory was full" in ended[0][1]
    assert ended[1][0] == "done"
    assert Record.read(tmp_path / "short").status == "completed"


def test_the_base_comes_back_or_is_loaded_anew(model_folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"text": f"{a} {b}", "label": str(i % 2)} for i, (a, b) in enumerate(itertools.pairwise(WORDS))]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    base, models = CachedBase(), []

    def run(name: str, seed: int) -> None:
        values = {
            "model": str(model_folders["bert"]),
            "task": "seq_cls",
            "method": name,
            "data": {"train": str(data), "seed": 1},
            # in bf16 a frozen base would stand in half precision, and one that is trained would not
            "train": {"max_steps": 2, "batch_size": 4, "seed": seed, "learning_rate": 1e-2, "precision": "fp32"}
            | {"gradient_checkpointing": True},
            "output": str(tmp_path / f"{name}-{seed}"),
        }
        config = RunConfig.build(values)
        train(config, Listener(trained=lambda run: models.append(run.model)), base=base)
        base.store(models.pop(), config)

    for name, loads in (("lora", 1), ("bitfit", 1), ("ln_tuning", 1), ("full", 1), ("ia3", 2)):
        run(name, 1)
        assert base.loads == loads, name
    run("ia3", 2)  # another seed draws another head
    assert base.loads == 3
    config = RunConfig.build(yaml.safe_load((tmp_path / "ia3-2" / "run.yaml").read_text()))
    tokenizer = load_tokenizer(config.model)
    lent = base(config, ["0", "1"], tokenizer, dtype=torch.float32)
    assert base.loads == 3
    assert not any(getattr(m, "gradient_checkpointing", False) or m._forward_hooks for m in lent.modules())
    fresh = load_base(config, ["0", "1"], tokenizer, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, fresh[key]) for key, tensor in lent.state_dict().items())
    before = checksums(lent)
    lent.classifier.bias.data[0] += 1e-7
    assert checksums(lent) != before
