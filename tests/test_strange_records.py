"""Records that siliang did not write, or not so: they are refused in a line, or taken for what they say."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import refused, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import SCORES, comparison, record
from tiny import make, word_tokenizer, write_jsonl

from siliang.config import RunConfig
from siliang.files import write_manifest
from siliang.records import Answers, Comparison, Record
from siliang.report.gather import gather
from siliang.report.page import render
from siliang.tasks.record import read_record
from siliang.train.run import train
from siliang.train.saving import read_state
from siliang.types import ConfigError, RecordError

HALF = json.loads('"\\ud800"')
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]

# A place in run.json, and what stands there.
RUN: list[tuple[str, Any]] = [
    *((name, -1) for name in ("seed", "parameters.trained", "rows.eval", "memory.peak_bytes", "learning_rate")),
    *((name, 1e3) for name in ("seed", "parameters.trained", "rows.eval", "memory.peak_bytes", "tokens_trained")),
    *((name, "1") for name in ("seed", "learning_rate", "seconds.train", "tokens_trained", "best_step", "rows.train")),
    *((name, None) for name in ("config", "seed", "labels", "parameters", "device", "final", "steps", "started_at")),
    *((name, []) for name in ("config", "config.data", "parameters", "memory", "final", "versions", "config.method")),
    *((name, 10**400) for name in ("seed", "parameters.total", "seconds.train", "final.accuracy", "learning_rate")),
    *((name, 10**30) for name in ("seed", "parameters.total", "seconds.train", "final.accuracy", "steps.0.step")),
    *((name, "NaN") for name in ("seed", "seconds.eval", "learning_rate", "rows.train")),
    *((name, DEEP) for name in ("labels", "config.data.train", "columns")),
    *((name, HALF) for name in ("error", "labels.0", "config.model")),
    ("schema_version", 0),
    ("schema_version", "1"),
    ("schema_version", True),
    ("status", "done"),
    ("status", 3),
    ("started_at", "yesterday"),
    ("started_at", 20260101),
    ("config.task", "token_cls"),
    ("config.task", "nothing"),
    ("config.data", {"train": "a.jsonl"}),
    ("config.method", {"name": "no such"}),
    ("config.method", {"name": 3}),
    ("config.method.r", 10**20),
    ("config.method", {}),
    ("config.data.train", 3),
    ("config.data.train", [{"weight": 1.0}]),
    ("config.data.template", "no such"),
    ("config.data.test_size", 7.0),
    ("config.train.seed", -1),
    ("config.distributed.deepspeed", "/etc/passwd"),
    ("config.unknown", 1),
    ("adjusted", {"no.such": 1}),
    ("adjusted", {"train.batch_size.x": 1}),
    ("adjusted", {"train.batch_size": "many"}),
    ("adjusted", {"train": 1}),
    ("adjusted", {"": 1}),
    ("labels", ["pos", "pos"]),
    ("labels", [1, 2]),
    ("labels", "posneg"),
    ("labels", []),
    ("labels", {"pos": 0}),
    ("layout", "nothing"),
    ("layout", 3),
    ("columns", {"text": 3}),
    ("unanswered", "no"),
    ("precision", "fp8"),
    ("precision", None),
    ("device.threads", -2),
    ("parameters", {"trained": 2, "total": 1}),
    ("rows.skipped", [1]),
    ("rows.skipped", "one"),
    ("memory.predicted_parts", {"weights": -1}),
    ("memory.predicted_parts", {str(i): 1 for i in range(200)}),
    ("memory.peak_bytes_by_rank", [1.5]),
    ("steps", {}),
    ("steps", [3]),
    ("steps.0.loss", [1]),
    ("steps.0.epoch", -1.0),
    ("steps.0.epoch", "Infinity"),
    ("steps.0.step", 10**6),
    ("steps.0.metrics", {"accuracy": "high"}),
    ("passed_over", [3, 1]),
    ("best_step", -1),
    ("final", {"accuracy": 1.5}),
    ("final", {"eval_loss": 1e300}),
    ("final", {"eval_loss": -1.0}),
    ("final", {"accuracy": [1]}),
    ("final", {"accuracy": True}),
    ("final", {str(i): 1.0 for i in range(2000)}),
    ("final", {"f1_PER": 1.5}),
    ("final", {"bleu": 101.0}),
    ("signatures", {"bleu": 1}),
    ("model_sha256", "x"),
    ("model_files", {"config.json": "0" * 63}),
    ("model_files", ["config.json"]),
    ("data_files", [{"path": "a"}]),
    ("data_files", [{"path": "a", "sha256": 3}]),
    ("versions", {"torch": 2.0}),
    ("extra", 1),
]
TEXTS = ["", " ", "{", "[]", "null", "3", '"a"', "\x00", "{}", '{"seed": NaN}', '{"seed": 1, "seed": 2}', "[" * 10**5]

COMPARISON: list[tuple[str, Any]] = [
    *((name, None) for name in ("config", "given", "trials", "started_at", "status")),
    *((name, []) for name in ("config", "given", "chosen", "base", "steps", "config.methods")),
    *((name, 3) for name in ("config", "trials.0", "trials.0.method", "trials.0.folder", "config.methods.0.label")),
    *(("trials.0.folder", name) for name in ("/etc", "../..", "runs/../../x", "C:\\x", "a\\..\\b")),
    *(("trials.0.folder", name) for name in ("~", "", ".", "a\x00b", "x://y")),
    ("trials.0.seed", -1),
    ("trials.0.seed", 2**40),
    ("trials.0.status", "gone"),
    ("trials.0.purpose", 1),
    ("trials.0.attempts", -1),
    ("trials.0.metrics", {"accuracy": "0.9"}),
    ("trials.0.method", "nobody"),
    ("trials.1.folder", "runs/full/seed-0"),
    ("config.task", "causal"),
    ("config.seeds", -3),
    ("config.methods.0.name", "no such"),
    ("config.search", {"r": 3}),
    ("base", {"eval_loss": 1.0}),
    ("base", {"eval_loss": "one", "perplexity": 2.0}),
    ("steps", {"full": 0}),
    ("steps", {"full": 1e3}),
    ("chosen", {"full": [1]}),
    ("data_files", 3),
    ("started_at", "NaN"),
    ("extra", {}),
]
ANSWERS: list[tuple[str, Any]] = [
    ("majority", 2.0),
    ("majority", "0.6"),
    ("classes", -1),
    ("classes", 2.5),
    ("rows", {}),
    ("rows.0.predicted", 3),
    ("rows.0.correct", "yes"),
    ("rows.0.probability", 7),
    ("prompts", [[]]),
    ("metrics", {"rouge_l": 7}),
    ("extra", None),
]
STATE: list[tuple[str, Any]] = [
    *((name, None) for name in ("optimizer", "scheduler", "random", "guard", "since_log", "tokens_trained")),
    *((name, 3) for name in ("optimizer", "scheduler", "random", "guard", "log", "evaluation_due")),
    ("optimizer.state.0.exp_avg", {"tensor": "nowhere"}),
    ("optimizer.state.0.exp_avg", {"tensor": "random/0/torch"}),
    ("optimizer.state.0.exp_avg", 3),
    ("optimizer.state.0", 3),
    ("optimizer.state", {"dict": [[10**6, {"dict": []}]]}),
    ("optimizer.state", {"dict": [[[1], 2]]}),
    ("optimizer.state", {"dict": 3}),
    ("optimizer.param_groups", []),
    ("optimizer.param_groups.0.lr", "fast"),
    ("optimizer.param_groups.0.lr", {"float": "inf"}),
    ("optimizer.param_groups.0.params", [10**9]),
    ("scheduler.last_epoch", "x"),
    ("scheduler.base_lrs", []),
    ("scheduler.step", 1),
    ("random.0.python", 3),
    ("random.0.numpy", {"tuple": ["MT19937", [1], 0, 0, 0.0]}),
    ("random.0.torch", 3),
    ("random.0.cuda", [3]),
    ("random", []),
    ("since_log.loss", [1]),
    ("since_log.steps", -1),
    ("tokens_trained", 10**30),
    ("guard.runs", {"dict": [["other", 1]]}),
    ("guard.skipped", "all"),
    ("log.steps", [3]),
    ("log.train_s", -1.0),
    ("log.train_s", {"float": "nan"}),
    ("log.steps_s", None),
    ("step", 10**9),
    ("step", 4),
    ("step", "2"),
    ("step", None),
    ("best", "high"),
    ("best", {"step": 2}),
    ("best", {"step": -1, "value": 0.5}),
    ("extra", 1),
]


def changed(values: Any, name: str, value: Any) -> Any:
    """With another value at a dotted place, whether it is there or not."""
    made = copy.deepcopy(values)
    *parts, last = name.split(".")
    inner = made
    for part in parts:
        inner = inner[int(part) if isinstance(inner, list) else part]
    inner[int(last) if isinstance(inner, list) else last] = copy.copy(value)
    return made


def write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps, with a checkpoint of the second."""
    place = tmp_path_factory.mktemp("trained")
    make("bert").save_pretrained(place / "base")  # type: ignore[operator]
    word_tokenizer().save_pretrained(place / "base")
    rows = [{"text": f"the film was {w}", "label": n} for w, n in (("good", "pos"), ("bad", "neg")) for _ in range(8)]
    values = {
        "model": str(place / "base"),
        "task": "seq_cls",
        "method": {"name": "lora", "r": 2},
        "data": {"train": str(write_jsonl(place / "data.jsonl", rows)), "max_length": 16},
        "train": {"batch_size": 4, "max_steps": 4, "save_every": 2, "log_every": 1, "keep": 9},
        "output": str(place / "run"),
    }
    train(RunConfig.build(values))
    return place / "run"


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def check_refusal(error: Exception, path: Path) -> None:
    assert isinstance(error, RecordError), repr(error)
    assert str(error).startswith(str(path)), error
    assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000, error


@pytest.mark.parametrize(("name", "value"), RUN, ids=lambda v: repr(v)[:30])
def test_a_strange_run(name: str, value: Any, folder: Path) -> None:
    path = folder / "run.json"
    write(path, changed(json.loads(path.read_text()), name, value))
    with pytest.raises(RecordError) as caught:
        read_record(folder)
    check_refusal(caught.value, path)


@pytest.mark.parametrize("text", TEXTS, ids=lambda v: repr(v)[:20])
@pytest.mark.parametrize("kind", [Record, Comparison, Answers])
def test_strange_texts(text: str, kind: type[Any], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    if kind is Answers and text == "{}":  # all of its fields have a default
        return
    with pytest.raises(RecordError) as caught:
        kind.open(path)
    check_refusal(caught.value, path)


def test_a_later_version(folder: Path) -> None:
    path = folder / "run.json"
    write(path, json.loads(path.read_text()) | {"schema_version": 2, "unknown": 1})
    for arguments in (("report", folder), ("predict", folder, "a"), ("train", "--resume", folder)):
        said = refused(*arguments)
        assert "was written by a later siliang: its schema_version is 2, and this one reads up to 1" in said


@pytest.mark.parametrize(("name", "value"), [RUN[0], ("labels", None), ("", "[]")])
def test_every_command_refuses_a_strange_run(name: str, value: Any, folder: Path) -> None:
    path = folder / "run.json"
    if name:
        write(path, changed(json.loads(path.read_text()), name, value))
    else:
        path.write_text(value)
    for arguments in (
        ("report", folder),
        ("eval", folder),
        ("predict", folder, "the film was good"),
        ("generate", folder, "hello"),
        ("chat", folder),
        ("merge", folder, "--output", folder.parent / "merged"),
        ("train", "--adapter", folder, "--data", "x.jsonl", "--output", folder.parent / "next"),
    ):
        assert "run.json" in refused(*arguments)


def test_a_run_that_goes_on_does_not_need_its_record(folder: Path) -> None:
    """What can be checked by it is not, and that is said."""
    checkpoint = interrupted(folder)
    write(folder / "run.json", {})
    ended = run("train", "--resume", folder)
    assert ended.code == 0 and f"{folder / 'run.json'} is damaged" in ended.out, ended
    assert Record.read(folder).status == "completed" and checkpoint.is_dir()


def test_a_record_of_another_task(folder: Path) -> None:
    path = folder / "run.json"
    values = changed(json.loads(path.read_text()), "config.classification", None)  # a section of its own task
    write(path, changed(values, "config.task", "TOKEN_CLS"))
    assert run("report", folder, "--output", folder / "page.html").code == 0  # which has nothing to hold it against
    for command in ("eval", "predict", "generate", "chat", "merge"):
        ended = run(command, folder, *(["--output", folder.parent / "merged"] if command == "merge" else []))
        assert ended.code == 2 and "Traceback" not in ended.err, ended


@pytest.mark.parametrize(("name", "value"), COMPARISON, ids=lambda v: repr(v)[:30])
def test_a_strange_comparison(name: str, value: Any, tmp_path: Path) -> None:
    path = comparison(tmp_path / "c", {"full": SCORES["full"]}) / "comparison.json"
    write(path, changed(json.loads(path.read_text()), name, value))
    with pytest.raises(RecordError) as caught:
        Comparison.open(path)
    check_refusal(caught.value, path)
    assert str(path) in refused("report", path.parent)


def test_a_comparison_does_not_go_on_with_a_strange_record(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c", {"full": SCORES["full"]})
    values = json.loads((folder / "comparison.json").read_text())
    (folder / "compare.yaml").write_text(json.dumps(values["config"] | {"output": str(folder)}))
    write(folder / "comparison.json", changed(values, "trials.0.folder", "../elsewhere"))
    assert "comparison.json" in refused("compare", folder / "compare.yaml")


@pytest.mark.parametrize(("name", "value"), ANSWERS, ids=lambda v: repr(v)[:30])
def test_strange_answers(name: str, value: Any, tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c", {"full": SCORES["full"]})
    path = folder / "runs" / "full" / "seed-0" / "answers.json"
    write(path, changed(json.loads(path.read_text()), name, value))
    assert str(path) in refused("report", folder)


def joined(tree: Any) -> Any:
    """A state's tree without what says that a mapping is one."""
    if isinstance(tree, dict) and set(tree) == {"dict"} and isinstance(tree["dict"], list):
        return {str(key): joined(value) for key, value in tree["dict"]}
    return [joined(value) for value in tree] if isinstance(tree, list) else tree


def split(tree: Any) -> Any:
    if isinstance(tree, dict) and set(tree) not in ({"tensor"}, {"dict"}, {"tuple"}, {"float"}):
        return {"dict": [[int(key) if key.isdigit() else key, split(value)] for key, value in tree.items()]}
    return [split(value) for value in tree] if isinstance(tree, list) else tree


@pytest.mark.parametrize(("name", "value"), STATE, ids=lambda v: repr(v)[:30])
def test_a_strange_state_of_a_checkpoint(name: str, value: Any, folder: Path) -> None:
    """Whose manifest fits it: whoever can write the folder can write that."""
    checkpoint = interrupted(folder)
    path = checkpoint / "state.json"
    write(path, split(changed(joined(json.loads(path.read_text())), name, value)))
    write_manifest(checkpoint)
    assert str(path) in refused("train", "--resume", folder)


def interrupted(folder: Path) -> Path:
    """The run as it was at step 2; its checkpoint."""
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4", ignore_errors=True)
    found = Record.read(folder)
    found.status, found.final, found.steps = "interrupted", {}, found.steps[:2]
    found.write(folder)
    return folder / "checkpoints" / "checkpoint-2"


def test_the_state_is_read_as_it_was_written(folder: Path) -> None:
    checkpoint = interrupted(folder)
    assert joined(json.loads((checkpoint / "state.json").read_text())).keys() == read_state(checkpoint).keys()
    assert run("train", "--resume", folder).code == 0
    assert Record.read(folder).status == "completed"


MANIFESTS: list[Any] = [
    3,
    [],
    {},
    {"files": 3},
    {"files": [1]},
    {"files": {"adapter_model.safetensors": 3}},
    {"files": {"adapter_model.safetensors": {"bytes": "x", "sha256": "y"}}},
    {"files": {"a\x00b": {"bytes": 1, "sha256": "0"}}},
    {"files": {"/etc/passwd": {"bytes": 1, "sha256": "0"}}},
    {"files": {"../run.json": {"bytes": 1, "sha256": "0"}}},
    {"files": {"": {"bytes": 1, "sha256": "0"}}},
    {"files": {"x" * 5000: {"bytes": 1, "sha256": "0"}}},
]


@pytest.mark.parametrize("values", MANIFESTS, ids=lambda v: repr(v)[:30])
def test_a_strange_manifest(values: Any, folder: Path) -> None:
    write(folder / "adapter" / "manifest.json", values)
    assert "is damaged" in refused("predict", folder, "the film was good")


# ---- any change at all ----

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["", "NaN", "Infinity", "SEQ_CLS", "../x", "lora", "\u202e\x1b[2J", "9" * 100]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from(["name", "a"]), st.integers(), max_size=2),
)


def places(values: Any) -> Iterator[tuple[Any, ...]]:
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (key,)
        if isinstance(value, dict | list):
            yield from ((key, *rest) for rest in places(value))


@st.composite
def mutations(draw: Callable[..., Any], values: Any) -> Any:
    """A tree with one to three values replaced, removed or added."""
    made = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, 3))):
        *parts, last = draw(st.sampled_from(list(places(made))))
        inner = made
        for part in parts:
            inner = inner[part]
        match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
            case "replace":
                inner[last] = draw(LEAVES)
            case "remove":
                del inner[last]
            case _ if isinstance(inner, dict):
                inner[draw(st.sampled_from(["x", "path", "name"]))] = draw(LEAVES)
            case _:
                inner.append(draw(LEAVES))
    return made


OWN = record(0.5, trained=10, memory=1, seed=0, method="lora").model_dump(mode="json")


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    derandomize=True,
)
@given(mutations(OWN))
def test_any_change_of_a_run_is_refused_or_shown(tmp_path_factory: pytest.TempPathFactory, values: Any) -> None:
    folder = tmp_path_factory.mktemp("run")
    write(folder / "run.json", values)
    try:
        render(gather([folder]))
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1, error
