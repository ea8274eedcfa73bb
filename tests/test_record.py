"""Records: what is written is read again as it was, and no secret is in it."""

import json
import math
from pathlib import Path

import pytest
from records import SCORES, comparison, record

from siliang.records import Comparison, Record, plain
from siliang.report.gather import gather
from siliang.report.summary import summarize
from siliang.secrets import redacted
from siliang.tasks import TASKS
from siliang.tasks.task import LOSS
from siliang.types import ConfigError, TaskType, first_line


def test_a_metric_that_is_no_number_is_written_and_read(tmp_path: Path) -> None:
    written = record(0.5, trained=10, memory=1, seed=0, method="lora")
    written.final |= {"eval_loss": math.nan, "perplexity": math.inf}
    written.steps[0].loss, written.steps[0].grad_norm = math.nan, -math.inf
    written.write(tmp_path)
    read = Record.read(tmp_path)
    assert math.isnan(read.final["eval_loss"]) and read.final["perplexity"] == math.inf
    assert read.steps[0].loss is not None and math.isnan(read.steps[0].loss)
    assert read.steps[0].grad_norm == -math.inf and read.final["accuracy"] == 0.5

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    json.loads((tmp_path / "run.json").read_text(), parse_constant=refuse)
    path = comparison(tmp_path / "c", SCORES) / "comparison.json"
    told = Comparison.open(path)
    told.base = {"eval_loss": math.nan, "perplexity": math.inf}
    told.save(path)
    assert math.isnan(Comparison.open(path).base["eval_loss"])


def test_a_number_is_better_than_none() -> None:
    for task in (TaskType.SEQ_CLS, TaskType.CAUSAL_LM):
        assert TASKS[task].quality.better(0.5, math.nan) and not TASKS[task].quality.better(math.nan, 0.5)
    assert LOSS.better(0.5, math.nan) and not LOSS.better(math.nan, 0.5)
    f1 = TASKS[TaskType.SEQ_CLS].metric("f1")
    assert not f1.better(math.nan, math.nan) and f1.better(math.nan, None)
    for name, higher in (("loss", False), ("eval_loss", False), ("perplexity", False), ("rouge_l", True)):
        metric = TASKS[TaskType.SEQ_2_SEQ_LM].metric(name)
        assert metric.better(0.5, 0.4) is higher and metric.better(0.4, 0.5) is not higher


def test_a_comparison_with_a_metric_that_is_no_number_is_shown(tmp_path: Path) -> None:
    scores = dict(SCORES) | {"lost": ([math.nan] * 3, 10, 300)}
    found = {line.label: line for line in summarize(gather([comparison(tmp_path, scores)]))}
    assert "lost" in found and found["lora"].on_front and not found["lost"].on_front


def test_secrets_are_hidden_in_texts_and_numbers_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "12345678")
    written = record(0.5, trained=1234567890, memory=1, seed=12345678, method="lora")
    written.parameters.total = 2 * 10**9
    written.config["output"] = "password 12345678"
    written.config["data"]["train"] = [{"path": "12345678", "weight": 12345678.0}]
    written.error = "12345678 was refused"
    written.write(tmp_path)
    read = Record.read(tmp_path)
    assert (read.parameters.trained, read.seed) == (1234567890, 12345678)
    assert (read.config["output"], read.error) == ("password ***", "*** was refused")
    assert read.config["data"]["train"] == [{"path": "***", "weight": 12345678.0}]
    assert redacted({"a": (1, "12345678", None, True, 0.5)}) == {"a": [1, "***", None, True, 0.5]}
    assert plain({"a": math.inf, "b": 1.5}) == {"a": "Infinity", "b": 1.5}


def test_the_first_line_of_an_error_that_says_nothing() -> None:
    for nothing in ("", "\n", " \n\t\n"):
        assert first_line(ValueError(nothing)) == first_line(ValueError(nothing), kind=True) == "ValueError"
        assert first_line(nothing) == ""
    assert first_line(OSError("\n  one \ntwo")) == "one" and first_line("one\ntwo") == "one"
    assert first_line(OSError("one\ntwo"), kind=True) == "OSError: one"


@pytest.mark.parametrize("text", ["{", "[]", '{"started_at": 3}', "\x00"])
def test_a_damaged_record_is_said_to_be(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json(:1)? is damaged"):
        Record.read(tmp_path)
    with pytest.raises(ConfigError, match="is not a run's folder"):
        Record.read(tmp_path / "nowhere")
