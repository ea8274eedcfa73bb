"""siliang's commands as functions: the same results as the commands, from settings in each of their forms."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run as command
from every_task import configured, make_models
from tiny import WORDS, write_jsonl

import siliang
from siliang.config import RunConfig
from siliang.data.examples import Text
from siliang.records import Record
from siliang.safety.safe_yaml import dump_yaml
from siliang.types import ConfigError, DataError, SiliangError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAMES = ("check", "plan", "train", "evaluate", "predict", "predict_file", "generate", "compare", "merge")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def config(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return configured("seq_cls", models, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def result(config: RunConfig) -> siliang.TrainingResult:
    return siliang.train(config)


def test_each_function_is_documented_whatever_was_imported() -> None:
    import siliang.merge
    import siliang.train.run
    from siliang import functions

    for name in NAMES:
        function = getattr(functions, name)
        assert callable(getattr(siliang, name)), name
        assert inspect.signature(getattr(siliang, name)) == inspect.signature(function), name
        assert "Raises:" in function.__doc__ and name in siliang.__all__


def test_settings_in_each_form_are_the_same(config: RunConfig, tmp_path: Path) -> None:
    values = config.model_dump(mode="json", exclude_unset=True)
    (tmp_path / "run.yaml").write_text(dump_yaml(values))
    same = [siliang.run_config(form) for form in (config, values, tmp_path / "run.yaml", str(tmp_path / "run.yaml"))]
    assert all(one == config for one in same)
    changed = siliang.run_config(config, data={"max_length": 16}, train={"epochs": 2.0}, method="bitfit")
    assert (changed.data.max_length, changed.data.train) == (16, config.data.train)
    assert (changed.train.epochs, changed.train.batch_size, changed.method.name) == (2.0, 4, "bitfit")
    assert siliang.run_config(config, data=tmp_path / "b.csv").data.train == str(tmp_path / "b.csv")


def test_a_section_that_is_written_as_one_value_keeps_it(tmp_path: Path) -> None:
    short = {"model": "m", "task": "seq_cls", "method": "ia3", "data": "a.csv", "output": "run"}
    (tmp_path / "run.yaml").write_text(dump_yaml(short | {"data": {"train": "a.csv"}}))
    for form in (short, tmp_path / "run.yaml"):
        found = siliang.run_config(form, method={"init_ia3_weights": False}, data={"max_length": 16})
        assert (found.method.name, found.method.arguments) == ("ia3", {"init_ia3_weights": False})
        assert (found.data.train, found.data.max_length) == ("a.csv", 16)
        assert siliang.run_config(form, method="bitfit").method.name == "bitfit"
    assert siliang.run_config(short).data.train == "a.csv"


@pytest.mark.parametrize(
    ("data", "paths"),
    [
        (Path("a.csv"), ["a.csv"]),
        ({"path": "a.csv", "weight": 2}, ["a.csv"]),
        ({"train": "a.csv", "max_length": 8}, ["a.csv"]),
        ({"train": {"path": Path("a.csv")}}, ["a.csv"]),
        ({"train": [Path("a.csv"), {"path": "b.csv"}]}, ["a.csv", "b.csv"]),
    ],
    ids=str,
)
def test_sources_in_each_form(data: Any, paths: list[str]) -> None:
    found = siliang.run_config(model="m", task="seq_cls", output="run", data=data)
    assert [source.path for source in found.data.train_sources] == paths


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            {"path": "a.csv", "weight": 0},
            "weight: input should be greater than 0. A source is a name, or {path, weight",
        ),
        ({"path": "a.csv", "wait": 2}, "wait is not a setting of a source"),
        ({"weight": 2}, "path is missing"),
        ({"path": " "}, "path: the name is empty"),
    ],
    ids=str,
)
def test_sources_that_are_wrong(source: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        siliang.run_config(model="m", task="seq_cls", output="run", data={"train": [source]})
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1


def test_what_is_looked_at_before_a_run(config: RunConfig, tmp_path: Path) -> None:
    values = config.model_dump(mode="json", exclude_unset=True)
    del values["output"]
    found = siliang.check(values)
    (tmp_path / "run.yaml").write_text(dump_yaml(values))
    shown = json.loads(command("check", tmp_path / "run.yaml", "--json").out)
    assert found.ok and [f.as_dict() for f in found.findings] == shown["findings"] and found.counts == shown["counts"]
    plan = siliang.plan(config, methods=["lora", "bitfit"], memory="64GB", device="cpu")
    assert [method.method for method in plan.methods] == ["lora", "bitfit"]
    assert all(method.fits and method.peak_bytes for method in plan.methods)


def test_a_run_is_trained_and_used(result: siliang.TrainingResult, config: RunConfig, tmp_path: Path) -> None:
    assert result.folder == Path(config.output) and result.record.final == Record.read(result.folder).final
    assert result.metrics["accuracy"] == result.record.final["accuracy"]
    opened = siliang.open_run(result.folder)
    metrics = siliang.evaluate(opened).metrics
    shown = json.loads(command("eval", result.folder, "--json").out)
    assert metrics == {name: value for name, value in shown.items() if isinstance(value, float)}
    texts = [" ".join(WORDS[i : i + 4]) for i in range(3)]
    found = siliang.predict(opened, texts)
    lines = [json.loads(line) for line in command("predict", result.folder, *texts, "--json").out.splitlines()]
    assert [p.values() for p in found] == lines and found == siliang.predict(str(result.folder), texts)
    unsure = siliang.predict(opened, texts, top=2, min_confidence=1.0)
    options = ("--top", "2", "--min-confidence", "1", "--json")
    lines = [json.loads(line) for line in command("predict", result.folder, *texts, *options).out.splitlines()]
    assert [p.values() for p in unsure] == lines and siliang.predict(opened, texts) == found
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    assert siliang.predict_file(opened, data, tmp_path / "out.jsonl", top=2) == 3
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["predicted_label"] for row in rows] == [p.predicted for p in found]
    assert [len(row["predicted_top"]) for row in rows] == [2, 2, 2]
    proof = siliang.merge(result.folder, tmp_path / "merged")
    assert proof.holds and (tmp_path / "merged" / "model.safetensors").is_file()


def test_a_run_that_writes(models: dict[str, Path], tmp_path: Path) -> None:
    lines: list[str] = []
    config = configured("causal_lm", models, tmp_path)
    result = siliang.train(config, say=lines.append, method="prompt_tuning", train={"max_steps": 3})
    assert any(line.startswith(("model", "模型")) for line in lines) and result.record.steps[-1].step == 3
    measured = siliang.evaluate(result.folder, measures=["rouge_l", "chrf"], rows=5)
    assert measured.metrics["written"] == 5 and measured.signatures.keys() == {"rouge_l", "chrf"}
    pieces: list[str] = []
    text = siliang.generate(result.folder, WORDS[3], max_new_tokens=4, on_text=pieces.append)
    assert text == "".join(pieces)
    how: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "top_k": 9, "top_p": 0.9, "seed": 3}
    how |= {"repetition_penalty": 1.2}
    options = [part for name, value in how.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    drawn = siliang.generate(result.folder, WORDS[3], system=WORDS[5], stop=[WORDS[0]], **how)
    shown = command("generate", result.folder, WORDS[3], "--system", WORDS[5], "--stop", WORDS[0], *options)
    assert drawn == shown.out.rstrip("\n")
    data = write_jsonl(tmp_path / "asked.jsonl", [{"instruction": WORDS[3]}])
    sampling = siliang.Sampling(**how)
    assert siliang.predict_file(result.folder, data, tmp_path / "out.jsonl", sampling=sampling) == 1
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["predicted_text"] == siliang.generate(result.folder, WORDS[3], **how)


def test_a_comparison(config: RunConfig, tmp_path: Path) -> None:
    values = config.model_dump(mode="json", exclude_unset=True)
    del values["method"]
    values |= {"methods": ["bitfit", "head"], "seeds": 1, "accept": ["SL042"], "output": str(tmp_path / "cmp")}
    found = siliang.compare(values)
    assert [method.label for method in found.methods] == ["bitfit", "head"] and found.record.status == "completed"
    assert found.page.is_file() and {trial.status for trial in found.record.trials} == {"completed"}


def test_errors_are_siliangs(result: siliang.TrainingResult, config: RunConfig, tmp_path: Path) -> None:
    cases: list[tuple[Any, str]] = [
        (lambda: siliang.train({"modle": "m"}), "modle"),
        (lambda: siliang.train(config, train={"learning_rte": 1.0}), "learning_rte"),
        (lambda: siliang.check(tmp_path / "none.yaml"), "none.yaml"),
        (lambda: siliang.evaluate(tmp_path), "not a run's folder"),
        (lambda: siliang.generate(result.folder, "a"), "siliang predict"),
        (lambda: siliang.predict(result.folder, ["a"], top=0), "1 or more"),
        (lambda: siliang.predict(result.folder, ["a"], min_confidence=2.0), "0 to 1"),
        (lambda: siliang.evaluate(result.folder, measures=["bleu"]), "seq_cls has other metrics"),
        (lambda: siliang.merge(result.folder, tmp_path, dtype="int8"), "float32"),  # type: ignore[arg-type]
    ]
    for call, says in cases:
        with pytest.raises(SiliangError) as caught:
            call()
        assert says in str(caught.value), says
    with pytest.raises(ConfigError, match="output is missing"):
        siliang.run_config({"model": "m", "task": "seq_cls", "data": {"train": "a.csv"}})


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells one after the other, in a folder of their own, with fewer steps."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "reviews.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace('"max_steps": 60', '"max_steps": 6')
            exec(compile(source, f"cell {number}", "exec"), names)
    assert names["proof"].holds and names["run"].record.steps[-1].step == 6
    assert (tmp_path / "reviews-merged" / "model.safetensors").is_file()


SCRIPT = """
import siliang

run = siliang.train("run.yaml", output="b", train={"learning_rate": 1e-3})
accuracy: float = run.metrics["accuracy"]
measured = siliang.evaluate(run.folder, measures=["bleu"], rows="all")
signature: str = measured.signatures["bleu"]
opened = siliang.open_run(run.folder)
labels: list[str] = [p.predicted for p in siliang.predict(opened, ["a", "b"])]
text: str = siliang.generate(opened, "say", top_p=0.9, temperature=0.8, stop=["end"])
rows: int = siliang.predict_file(opened, "a.csv", "b.csv", sampling=siliang.Sampling(seed=1))
codes: list[str] = [f.code for f in siliang.check(model="m", task="seq_cls", data="a.csv").findings]
peak: int = siliang.plan("run.yaml", memory="8GB").methods[0].peak_bytes
best = siliang.compare("compare.yaml", seeds=2).recommendation.best
holds: bool = siliang.merge(run.folder, "merged").holds
"""


@pytest.mark.long
def test_a_script_passes_pyrights_strict_mode(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(Path(siliang.__file__).parents[1])]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    ended = subprocess.run(
        [sys.executable, "-m", "pyright", "-p", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout


def test_a_text_alone_is_one_text(result: siliang.TrainingResult) -> None:
    run = siliang.open_run(result.folder)
    assert siliang.predict(run, "good film") == siliang.predict(run, ["good film"])


def test_arguments_of_another_kind_are_errors_in_words(result: siliang.TrainingResult) -> None:
    run: Any = siliang.open_run(result.folder)
    anything: Any = siliang
    cases: list[tuple[Any, tuple[Any, ...], str]] = [
        (anything.predict, (5, ["a"]), r"run = 5 \(int\): must be the folder of a run"),
        (anything.predict, (run, ["a", 5]), r"inputs\[1\] = 5 \(int\): must be a text"),
        (anything.predict, (run, {"a": 1}), r"inputs = .* \(dict\): must be texts"),
        (anything.predict, (run, None), r"inputs = None"),
        (anything.predict, (run, b"abc"), r"inputs = b'abc' \(bytes\)"),
        (anything.predict, (run, [None]), r"inputs\[0\] = None \(NoneType\): must be a text"),
        (anything.predict, (run, [{"text": "a"}]), r"inputs\[0\] = .* \(dict\): must be a text.*predict_file"),
        (anything.evaluate, (run, 5), r"data = 5"),
        (anything.generate, (run, None), r"instruction = None"),
        (anything.predict_file, (run, 5, "a.csv"), r"data = 5"),
        (anything.merge, (None, "a"), r"run = None"),
        (anything.train, (5,), r"settings = 5 \(int\): must be the path of a run.yaml"),
    ]
    for function, arguments, says in cases:
        with pytest.raises(ConfigError, match=says):
            function(*arguments)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("plan", {"methods": ["lorra"]}, "method 'lorra' is not one of"),
    ("plan", {"memory": -5}, "memory = -5: must be 1 or more"),
    ("plan", {"device": "tpu"}, r"device = 'tpu' \(str\): must be 'cpu', 'cuda' or None"),
    ("compare", {"jobs": 0}, "jobs = 0: must be 1 or more"),
    ("compare", {"jobs": 1.5}, r"jobs = 1.5 \(float\): must be a whole number"),
    ("train", {"say": "print"}, "say = 'print' .*: must be a function"),
    ("train", {"progress": 3}, "progress = 3 .*: must be a function"),
    ("train", {"resume": "yes"}, "resume = 'yes' .*: must be True or False"),
    ("predict", {"inputs": "a", "top": "3"}, r"top = '3' \(str\): must be a whole number or None"),
    ("predict", {"inputs": "a", "min_confidence": "0.5"}, "min_confidence = '0.5' .*: must be a number or None"),
    ("predict", {"inputs": "a", "batch_size": 0}, "batch_size = 0: must be 1 or more"),
    ("predict", {"inputs": "a", "prompt_name": "a"}, "prompt_name = 'a' .*: must be 'query', 'document', 'none' or"),
    ("generate", {"instruction": "a", "temperature": "1"}, "temperature = '1' .*: must be a number"),
    ("generate", {"instruction": "a", "temperature": math.inf}, "temperature = inf: must be 0 or more"),
    (
        "generate",
        {"instruction": "a", "temperature": 10**400},
        "temperature is too large or too small: must be between -1.8e.308 and",
    ),
    ("generate", {"instruction": "a", "top_p": -(10**5000)}, "top_p is too large or too small"),
    (
        "generate",
        {"instruction": "a", "max_new_tokens": 10**5000},
        "max_new_tokens is too large or too small: must be between -9,223,",
    ),
    ("predict", {"inputs": "a", "batch_size": Fraction(-(10**5000), 3)}, "batch_size is too large or too small"),
    ("plan", {"memory": 1e300}, "memory is too large or too small"),
    (
        "predict",
        {"inputs": "a", "min_confidence": math.nan},
        r"min_confidence = nan \(float\): must be a number or None",
    ),
    ("predict", {"inputs": "a", "top": math.nan}, r"top = nan \(float\): must be a whole number or None"),
    *(
        ("generate", {"instruction": "a", name: math.nan}, rf"{name} = nan \(float\): must be a (whole )?number")
        for name in ("temperature", "top_p", "repetition_penalty", "max_new_tokens", "top_k", "seed")
    ),
    ("generate", {"instruction": "a", "max_new_tokens": 2.5}, "max_new_tokens = 2.5 .*: must be a whole number"),
    ("generate", {"instruction": "a", "seed": -1}, "seed = -1: must be 0 or more"),
    ("generate", {"instruction": "a", "stop": [5]}, r"stop = \[5\] .*: must be a list of texts"),
    ("merge", {"output": "m", "dtype": "int8"}, "dtype = 'int8' .*: must be 'float32', 'bfloat16' or 'float16'"),
]


@pytest.mark.parametrize(("name", "arguments", "says"), WRONG, ids=[f"{name} {[*own][-1]}" for name, own, _ in WRONG])
def test_arguments_are_checked_before_anything_is_read(name: str, arguments: dict[str, Any], says: str) -> None:
    anything: Any = siliang
    run = {"run": "there is none"} if name in ("predict", "generate", "merge") else {}
    with pytest.raises(ConfigError, match=says):
        getattr(anything, name)(**run, **arguments)


def test_numbers_of_numpy_and_one_text_are_taken() -> None:
    sampling = siliang.Sampling(temperature=np.float32(0.5), seed=np.int64(3), stop="a")
    assert sampling == siliang.Sampling(temperature=0.5, seed=3, stop=("a",)) and type(sampling.seed) is int


def test_other_ways_to_write_a_number() -> None:
    anything: Any = siliang
    with pytest.raises(ConfigError, match="model is missing"):
        anything.plan(memory=24e9)
    with pytest.raises(ConfigError, match=r"lang = array\(.*: must be 'en' or 'zh'"):
        anything.compare(lang=np.array(["en", "zh"]))
    with pytest.raises(TypeError, match=r"predict\(\) missing 2 required positional arguments"):
        anything.predict()
    with pytest.raises(ConfigError, match=r"data\.path is not a setting"):
        anything.run_config(model="m", task="seq_cls", output="run", data={"path": "a.csv", "max_length": 8})


def test_options_of_generating_are_not_for_classes(result: siliang.TrainingResult, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "good"}])
    for more in ({"sampling": siliang.Sampling(8)}, {"system": "a"}, {"batch_size": 2}):
        anything: Any = more
        with pytest.raises(ConfigError, match="does not generate text"):
            siliang.predict_file(result.folder, source, tmp_path / "out.csv", **anything)


def test_texts_that_cannot_be_predicted_are_named(result: siliang.TrainingResult) -> None:
    run: Any = siliang.open_run(result.folder)
    anything: Any = siliang
    cases: list[tuple[Any, Any, str]] = [
        (anything.predict, ["good", " "], r"inputs\[1\] = ' ' is blank"),
        (anything.predict, [["", ""]], r"inputs\[0\] = .* is blank"),
        (anything.predict, ["\ud800x"], r"inputs\[0\] holds half of a character, \\ud800"),
        (anything.generate, "\ud800 a", r"instruction holds half of a character"),
        (anything.predict, [("a", "b")], r"trained on texts alone, and 'a\\tb' is not one text"),
        (anything.predict, [Text("a")], r"'Text' is not one text"),
    ]
    for function, inputs, says in cases:
        with pytest.raises(DataError, match=says):
            function(run, inputs)
    assert siliang.predict(run, [["good film"]]) == siliang.predict(run, ["good film"])


def test_a_folder_is_resumed(config: RunConfig, tmp_path: Path) -> None:
    done = siliang.train(config, output=str(tmp_path / "run"), train={"max_steps": 2, "save_every": 2})
    changed = {"max_steps": 3, "share_beginnings": False, "frozen_weights": "converted"}
    more = siliang.train(done.folder, resume=True, train=changed)
    assert more.record.steps[-1].step == 3 and more.folder == done.folder and len(more.record.changed) == 3
    for says, arguments in (
        ("give a settings file, or resume=True", {"settings": done.folder}),
        ("is not a run's folder", {"settings": tmp_path, "resume": True}),
        ("leave out output", {"settings": done.folder, "resume": True, "output": str(tmp_path / "other")}),
    ):
        anything: Any = arguments
        with pytest.raises(ConfigError, match=says):
            siliang.train(**anything)


def test_functions_print_nothing(config: RunConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    logging.enable_progress_bar()
    capfd.readouterr()
    run = siliang.train(config, output=str(tmp_path / "run"))
    siliang.evaluate(run.folder)
    siliang.merge(run.folder, tmp_path / "merged")
    assert capfd.readouterr() == ("", "") and logging.is_progress_bar_enabled()
