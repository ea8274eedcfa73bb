"""`siliang eval --harness`: the figures of lm-eval on PEFT's model of the same adapter, with tasks and data of one's
own, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import refused, run
from every_task import configured, make_models
from lm_eval import evaluator, tasks
from lm_eval.models import huggingface
from peft import PeftModel
from tiny import WORDS, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from siliang.config import RunConfig
from siliang.records import Record
from siliang.run_folder import open_run
from siliang.train.run import train
from siliang.types import ConfigError
from siliang.use import harness
from siliang.use.harness import run_harness

TEMPLATE = (
    "{{ style | default('the') }} {% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def trained(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is trained until it differs from its base model."""
    folder = tmp_path_factory.mktemp("run")
    config = configured("causal_lm", models, folder, "lora", max_steps=20, learning_rate=0.3)
    train(config)
    return Path(config.output)


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two tasks, which choose a word and write one."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [
        {"q": " ".join(WORDS[i : i + 5]), "choices": [WORDS[i % 20], WORDS[(i + 3) % 20]], "gold": i % 2}
        for i in range(16)
    ]
    data = write_jsonl(folder / "rows.jsonl", lines)
    both = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "Human: {{q}} Assistant:",
        "metadata": {"version": 1.0},
    }
    choose = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    choose |= {"task": "choose_word", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    write = {"output_type": "generate_until", "doc_to_target": "{{choices[gold]}}"}
    write |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 3}, "metric_list": [{"metric": "chrf"}]}
    for name, task in (("choose", choose), ("write", write | {"task": "write_word"})):
        (folder / f"{name}.yaml").write_text(json.dumps(both | task))  # JSON is YAML
    return folder


def of_peft(trained: Path, model: Path, folder: Path) -> dict[str, Any]:
    """lm-eval's results on PEFT's model."""
    base = AutoModelForCausalLM.from_pretrained(model)
    tuned = PeftModel.from_pretrained(base, str(trained / "adapter"))
    make: Any = huggingface.HFLM
    manager: Any = tasks.TaskManager(include_path=str(folder), include_defaults=False)
    wrapped = make(pretrained=tuned, tokenizer=AutoTokenizer.from_pretrained(model), batch_size=4)
    evaluate: Any = evaluator.simple_evaluate
    found = evaluate(wrapped, tasks=["choose_word", "write_word"], task_manager=manager, log_samples=False)
    return found["results"]


def test_the_figures_are_those_on_pefts_model(
    trained: Path, models: dict[str, Path], own_tasks: Path, tmp_path: Path
) -> None:
    expected = of_peft(trained, models["causal_lm"], own_tasks)
    ended = run("eval", trained, "--harness", own_tasks, "--json")
    found = json.loads(ended.out)
    assert found["rows"] == {"choose_word": 16, "write_word": 16} and found["versions"]["lm-eval"] == "0.4.13"
    for task, metrics in expected.items():
        ours = {name.split("/")[1]: value for name, value in found.items() if name.startswith(f"{task}/")}
        theirs = {key.split(",")[0]: v for key, v in metrics.items() if "," in key and not isinstance(v, str)}
        assert ours == pytest.approx(theirs), task
    assert 0 < found["choose_word/acc"] < 1
    kept = Record.read(trained).harness
    assert {f"{task}/{name}": v for task, one in kept.items() for name, v in one.metrics.items()} == {
        name: value for name, value in found.items() if "/" in name
    }
    assert kept["choose_word"].rows == 16 and kept["choose_word"].version == "1.0" and not kept["write_word"].chat
    ended = run("report", trained, "--output", tmp_path / "page.html")
    assert (
        "choose_word/acc" in ended.out
        and "acc_stderr" not in ended.out
        and f"{found['choose_word/acc']:.4f}" in ended.out
    )
    page = (tmp_path / "page.html").read_text()
    assert "choose_word/acc_norm" in page and "write_word/chrf" in page


def test_one_file_some_rows_and_the_runs_template(
    trained: Path, own_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = run("eval", trained, "--harness", own_tasks / "choose.yaml", "--rows", "5", "--few-shot", "1")
    assert "choose_word/acc_norm" in shown.out and "5 rows, version 1.0" in shown.out, shown
    assert "write_word" not in shown.out
    # in a folder without git, and without a version
    task = json.loads((own_tasks / "choose.yaml").read_text())
    del task["metadata"]
    (tmp_path / "own.yaml").write_text(json.dumps(task))
    monkeypatch.chdir(tmp_path)
    shown = run("eval", trained, "--harness", tmp_path / "own.yaml", "--rows", "5")
    assert "5 rows\n" in shown.out and "version" not in shown.out and "fatal" not in shown.err, shown
    result = run_harness(open_run(trained), [str(own_tasks / "choose.yaml")], chat=True)
    assert result.rows == {"choose_word": 16}


def test_chat_asks_in_the_template_and_with_the_arguments_of_the_training(
    models: dict[str, Path], own_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    config = configured("causal_lm", models, tmp_path)
    values = config.model_dump(mode="json", exclude_unset=True)
    values["data"] |= {"template": str(tmp_path / "mine.jinja"), "template_arguments": {"style": "good"}}
    train(RunConfig.build(values))
    asked: list[str] = []
    make: Any = huggingface.HFLM

    class Watched(make):
        def apply_chat_template(self, *arguments: Any, **more: Any) -> str:
            asked.append(super().apply_chat_template(*arguments, **more))
            return asked[-1]

    monkeypatch.setattr(huggingface, "HFLM", Watched)
    run_harness(open_run(Path(config.output)), [str(own_tasks / "choose.yaml")], rows=2, chat=True)
    assert asked and all(text.startswith("good") for text in asked), asked


def test_a_run_on_plain_texts_has_no_template_to_ask_in(
    models: dict[str, Path], own_tasks: Path, tmp_path: Path
) -> None:
    config = configured("causal_lm", models, tmp_path)
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": " ".join(WORDS[i : i + 5])} for i in range(12)])
    values = config.model_dump(mode="json", exclude_unset=True)
    values["data"] |= {"train": str(data)}
    train(RunConfig.build(values))
    says = refused("eval", config.output, "--harness", own_tasks / "choose.yaml", "--chat")
    assert "trained without one" in says and "leave --chat out" in says


def test_what_cannot_be_run_is_one_line(
    trained: Path,
    models: dict[str, Path],
    own_tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = json.loads((own_tasks / "choose.yaml").read_text())
    broken["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "none.jsonl")
    (tmp_path / "broken.yaml").write_text(json.dumps(broken))
    (tmp_path / "empty").mkdir()
    cases = (
        ((tmp_path / "broken.yaml",), "none.jsonl"),
        ((tmp_path / "empty",), "has no task"),
        ((tmp_path / "none.yaml",), "no such file"),
        ((own_tasks, "--measures", "bleu"), "does not go with --harness"),
    )
    for arguments, says in cases:
        assert says in refused("eval", trained, "--harness", *arguments), arguments
    assert "goes with --harness" in refused("eval", trained, "--chat")
    other = configured("seq_cls", models, tmp_path)
    train(other)
    assert "its task is seq_cls" in refused("eval", other.output, "--harness", own_tasks).replace(
        "the task", "its task"
    )
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'siliang\[harness\]'"):
        run_harness(open_run(trained), ["anything"])
