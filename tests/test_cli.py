"""The commands end to end, in processes of their own, and what they say to bad input."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from tiny import WORDS, make, write_jsonl
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from siliang import PeftModel
from siliang.cli.main import main
from siliang.records import Record

ENV = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


def siliang(*arguments: object, code: int = 0, stdin: str = "") -> str:
    """Runs a command; returns its output, or, where it should fail, its error."""
    done = subprocess.run(
        [sys.executable, "-m", "siliang", *map(str, arguments)], capture_output=True, text=True, env=ENV, input=stdin
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that must fail in this process, for long tables of cases; returns its error."""

    def run(*arguments: object, code: int = 2) -> str:
        monkeypatch.setattr(sys, "argv", ["siliang", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped, warnings.catch_warnings():
            main()
        error = capsys.readouterr().err
        assert stopped.value.code == code, error
        assert "Traceback" not in error
        return error

    return run


QUICK = ("--set", "train.batch_size=8", "--set", "data.max_length=32", "--set", "train.log_every=2")


@pytest.fixture(scope="module")
def classifier(model_folders: dict[str, Path], review_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "classifier"
    flags = ("--model", model_folders["bert"], "--data", review_file, "--task", "seq_cls", "--method", "lora")
    out = siliang(
        "train",
        *flags,
        "--output",
        run,
        *QUICK,
        "--set",
        "train.epochs=30",
        "--set",
        "train.learning_rate=1e-2",
        "--set",
        "train.precision=fp32",  # as eval computes
    )
    assert "lora trains" in out and "precision" in out and "tokens/s" in out and "to go" in out
    return run


@pytest.fixture(scope="module")
def writer(model_folders: dict[str, Path], instruction_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    settings = folder / "run.yaml"
    settings.write_text(
        f"model: {model_folders['bloom']}\ntask: causal_lm\nmethod: {{name: lora, r: 4}}\n"
        f"data: {{train: {instruction_file}, max_length: 32}}\n"
        "train: {max_steps: 12, batch_size: 4, save_every: 5, eval_every: 6, learning_rate: 0.01}\n"
        f"output: {folder / 'out'}\n"
    )
    siliang("train", settings, "--method", "bitfit")
    return folder / "out"


def test_the_record(classifier: Path) -> None:
    record = Record.read(classifier)
    assert record.status == "completed"
    assert record.labels == ["neg", "pos"]
    assert record.parameters.trained < record.parameters.total
    assert record.parameters.adapter_bytes == (classifier / "adapter" / "adapter_model.safetensors").stat().st_size
    assert record.rows.train == 54 and record.rows.eval == 6
    assert record.tokens_trained == 30 * 54 * 4  # epochs, rows, words
    assert record.memory.peak_bytes >= record.memory.loaded_bytes > 0
    losses = [s.loss for s in record.steps if s.loss is not None]
    assert losses[-1] < losses[0] / 2
    assert record.final["accuracy"] == 1.0
    assert len(record.model_sha256) == len(record.data_sha256) == 64
    assert record.config["train"]["learning_rate"] == 0.01


def test_predict_and_eval_need_only_the_folder(classifier: Path) -> None:
    out = siliang("predict", classifier, "the film was good", "the film was dull")
    assert [line.split("\t")[0] for line in out.splitlines()] == ["pos", "neg"]
    from_stdin = siliang("predict", classifier, "--json", stdin="the story was bright\n\nthe actor was bad\n")
    assert [json.loads(line)["label"] for line in from_stdin.splitlines()] == ["pos", None, "neg"]
    metrics = json.loads(siliang("eval", classifier, "--json"))
    assert metrics["accuracy"] == Record.read(classifier).final["accuracy"]
    assert metrics["loss"] == pytest.approx(Record.read(classifier).final["eval_loss"], rel=1e-4)


def test_predict_reads_files_and_keeps_places(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of data is read, by the run's columns; an empty line keeps its place."""

    def predict(*arguments: object, stdin: str = "", code: int = 0) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["siliang", "predict", str(classifier), *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped, warnings.catch_warnings():
            main()
        said = capsys.readouterr()
        assert stopped.value.code == code and "Traceback" not in said.err
        return (said.err if code else said.out).split("\n")[:-1]

    assert [line.split("\t")[0] for line in predict(stdin="the film was good\n\nthe film was dull\n")] == [
        "pos",
        "",
        "neg",
    ]
    (tmp_path / "d.csv").write_text("id,text\n1,the film was dull\n2,\n3,the film was good\n")
    (tmp_path / "d.txt").write_text("the film was dull\n\nthe film was good\n")
    write_jsonl(tmp_path / "d.jsonl", [{"text": "the film was dull"}, {"text": None}, {"text": "the film was good"}])
    for name in ("d.csv", "d.txt", "d.jsonl"):
        assert [line.split("\t")[0] for line in predict(tmp_path / name)] == ["neg", "", "pos"]
    shown = [json.loads(line) for line in predict("--json", tmp_path / "d.csv")]
    assert [row["label"] for row in shown] == ["neg", None, "pos"] and shown[1]["text"] == ""
    assert predict(tmp_path / "gone.csv", code=2) == [f"error[SLE03]: There is no data file {tmp_path / 'gone.csv'}."]
    (tmp_path / "e.csv").write_text("words\ngood\n")
    assert (
        "has no column 'text', which the run was trained on; it has 'words'" in predict(tmp_path / "e.csv", code=2)[0]
    )


def test_pairs_are_asked_as_pairs(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run on pairs of texts says that it needs the second one, in predict and in eval."""

    def siliang_here(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["siliang", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped, warnings.catch_warnings():
            main()
        said = capsys.readouterr()
        assert stopped.value.code == code and "Traceback" not in said.err, said.err
        return said.err if code else said.out

    rows = [
        {"idx": i, "premise": f"the {w}", "hypothesis": h, "label": "xy"[n]}
        for i, w in enumerate(WORDS[:10])
        for n, h in enumerate(("it was good", "it was bad"))
    ]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    run = tmp_path / "run"
    flags = ("--model", model_folders["bert"], "--task", "seq_cls", "--data", data, "--output", run)
    out = siliang_here("train", *flags, *QUICK, "--set", "train.max_steps=2")
    assert "text from 'premise', text_pair from 'hypothesis', 'label'; not used: 'idx'" in out
    error = siliang_here("predict", run, "the film", code=2)
    assert "'premise' and 'hypothesis'" in error and "is no pair" in error
    one, row = siliang_here("predict", run, "the film\tit was good"), siliang_here("predict", run, data).splitlines()
    assert one.split("\t")[2:] == ["the film", "it was good\n"] and len(row) == 20
    assert row[0].endswith("\tthe the\tit was good")
    assert "rows 20" in siliang_here("eval", run, "--data", data)
    alone = write_jsonl(tmp_path / "e.jsonl", [{"premise": "the film", "label": "x"}])
    assert "has no column 'hypothesis', which the run was trained on" in siliang_here(
        "eval", run, "--data", alone, code=2
    )


def test_merge_is_proved_and_opens_plainly(classifier: Path, model_folders: dict[str, Path], tmp_path: Path) -> None:
    out = siliang("merge", classifier, "--output", tmp_path / "merged")
    assert out.startswith("verified: largest logit difference") and "100.00%" in out
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "neg", 1: "pos"}
    base = AutoModelForSequenceClassification.from_pretrained(
        model_folders["bert"], num_labels=2, ignore_mismatched_sizes=True
    )
    tuned = PeftModel.from_pretrained(base, classifier / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert_close(merged.eval()(input_ids=ids).logits, tuned(input_ids=ids).logits)
    assert "not empty" in siliang("merge", classifier, "--output", tmp_path / "merged", code=2)


def test_causal_run(writer: Path, model_folders: dict[str, Path], tmp_path: Path) -> None:
    assert siliang("generate", writer, "say one", "--max-new-tokens", 3).endswith("\n")
    assert "tuned:" in siliang("generate", writer, "say one", "--base", "--temperature", 0.5, "--max-new-tokens", 2)
    assert "use `siliang generate`" in siliang("predict", writer, "a", code=2)
    assert float(json.loads(siliang("eval", writer, "--json"))["perplexity"]) > 1
    siliang("merge", writer, "--output", tmp_path / "merged", "--dtype", "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    # checkpoints are adapter folders
    checkpoints = sorted(p.name for p in (writer / "checkpoints").iterdir())
    assert checkpoints == ["checkpoint-10", "checkpoint-12"]
    PeftModel.from_pretrained(make("bloom"), writer / "checkpoints" / "checkpoint-10")
    assert {s.step for s in Record.read(writer).steps if s.eval_loss is not None} == {6, 12}


def test_full_and_head(model_folders: dict[str, Path], review_file: Path, tmp_path: Path) -> None:
    for method in ("full", "head"):
        flags = ("--model", model_folders["bert"], "--data", review_file, "--task", "SEQ_CLS", "--method", method)
        siliang("train", *flags, "--output", tmp_path / method, *QUICK, "--set", "train.max_steps=3")
        assert siliang("predict", tmp_path / method, "the film was good").split("\t")[0] in ("neg", "pos")
    record = Record.read(tmp_path / "full")
    assert record.parameters.trained == record.parameters.total
    assert "plain model already" in siliang("merge", tmp_path / "full", "--output", tmp_path / "m", code=2)


def test_interrupted_then_resumed(model_folders: dict[str, Path], review_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--model", model_folders["bert"], "--data", review_file, "--task", "seq_cls", "--output", run, *QUICK)
    command = [sys.executable, "-m", "siliang", "train", *map(str, flags), "--set", "train.max_steps=400"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("step") and int(line.split("/")[0].split()[1]) >= 4:
                break
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate(timeout=60)
    assert process.returncode == 130, rest + error
    assert error.startswith("Stopped at step") and f"siliang train --resume {run}" in error
    assert Record.read(run).status == "interrupted"
    assert "is not finished" in siliang("predict", run, "a", code=2)
    stopped_at = int(error.split()[3])
    (run / "run.yaml").write_text(
        (run / "run.yaml").read_text().replace("max_steps: 400", f"max_steps: {stopped_at + 4}")
    )
    out = siliang("train", "--resume", run)
    steps = [int(line.split("/")[0].split()[1]) for line in out.splitlines() if line.startswith("step")]
    assert min(steps) > stopped_at
    assert Record.read(run).status == "completed"


def test_bad_input(here: Callable[..., str], model_folders: dict[str, Path], review_file: Path, tmp_path: Path) -> None:
    (tmp_path / "no-model").mkdir()
    (tmp_path / "full" / "a").mkdir(parents=True)
    (tmp_path / "bad.yaml").write_text("model: [")
    (tmp_path / "empty.jsonl").write_text("")
    good = {"--model": model_folders["bert"], "--data": review_file, "--task": "seq_cls", "--output": tmp_path / "out"}
    cases: list[tuple[dict[str, object], tuple[object, ...], str]] = [
        ({"--model": tmp_path / "missing"}, (), "There is no model folder"),
        ({"--model": tmp_path / "no-model"}, (), "config.json is missing"),
        ({"--data": tmp_path / "missing.csv"}, (), "There is no data file"),
        ({"--data": tmp_path / "empty.jsonl"}, (), "holds no rows"),
        ({}, ("--set", "data.columns.text=review"), "has no column 'review'"),
        ({}, ("--set", "data.labels=[pos, other]"), "has the label 'neg', which is not one of pos, other"),
        ({}, ("--set", "method.target_modules=[qury]"), "'qury' matches no module"),
        ({"--model": model_folders["llama"], "--method": "bitfit"}, (), "has none"),
        ({"--output": tmp_path / "full"}, (), "is not empty"),
        ({"--method": "lorra"}, (), "Did you mean 'lora'"),
        ({}, ("--set", "train.lr=1"), "train.lr is not a setting"),
        ({}, (tmp_path / "bad.yaml",), "bad.yaml:1"),
        ({}, (tmp_path / "missing.yaml",), "no settings file"),
        ({}, ("--resume", tmp_path / "full"), "--resume"),
    ]
    for change, extra, message in cases:
        flags = [str(part) for pair in (good | change).items() for part in pair]
        error = here("train", *flags, *extra)
        assert message in error
        assert re.match(r"error\[SLE\d\d\]: ", error) and error.count("\n") <= 2, error
        assert not (tmp_path / "out").exists(), message
    assert "No such option" in here("train", "--modle", "x")
    assert "--resume. `siliang train --resume RUN` resumes" in here("compare", "--resume", "x")  # a command, no setting
    assert "`--set method=lora` and `--set quantization.bits=4`" in here("train", "--qlora")
    assert "is not a run's folder" in here("predict", tmp_path / "full", "a")
    # and once as the user meets it
    assert siliang(
        "train", "--model", tmp_path / "missing", "--data", "x", "--task", "seq_cls", "--output", "y", code=2
    )


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/bin/mount").exists(), reason="needs root to mount a small disk")
def test_full_disk(model_folders: dict[str, Path], review_file: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        flags = ("--model", model_folders["bert"], "--data", review_file, "--task", "seq_cls", "--output", disk / "run")
        error = siliang("train", *flags, *QUICK, "--set", "train.max_steps=4", code=2)
        assert "are free on that disk" in error
        assert not list(disk.iterdir())
        run = tmp_path / "run"
        siliang("train", *flags[:-1], run, *QUICK, "--set", "train.max_steps=2")
        (disk / "filler").write_bytes(bytes(2**20 - 64 * 1024))
        assert "disk is full" in siliang("merge", run, "--output", disk / "merged", code=2)
        assert [p.name for p in disk.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_skipped_rows_are_listed(model_folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"instruction": f"say {w}", "output": w if w != "one" else ""} for w in WORDS[-20:]]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    flags = ("--model", model_folders["llama"], "--data", data, "--task", "causal_lm", "--output", tmp_path / "run")
    error = siliang("train", *flags, *QUICK, code=2)
    line = WORDS[-20:].index("one") + 1 if "one" in WORDS[-20:] else 0
    assert f"d.jsonl:{line} has an empty 'output'" in error and "data.skip_bad_rows=true" in error
    out = siliang("train", *flags, *QUICK, "--set", "data.skip_bad_rows=true", "--set", "train.max_steps=2")
    assert "1 skipped" in out
    assert len(Record.read(tmp_path / "run").rows.skipped) == 1


def test_lists() -> None:
    assert all(name in siliang("methods") for name in ("lora", "bitfit", "full", "head"))
    shown = siliang("config")
    assert "train.learning_rate: null" in shown and "r: 8" in shown
