"""Predictions of a whole file, into a file: order, columns, formats, and going on where it was stopped."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from commands import run
from every_task import configured, make_models, rows_of
from tiny import write_jsonl

from siliang.run_folder import OpenedRun, open_run
from siliang.train.run import train
from siliang.types import ConfigError, DataError, InterruptedRunError, OutputError
from siliang.use import predict_file as module
from siliang.use.predict import predict
from siliang.use.predict_file import predict_file


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    models, found = make_models(folder), dict[str, Path]()
    for task in ("seq_cls", "several_labels", "number", "token_cls", "question_ans", "reward"):
        found[task] = folder / f"run-{task}"
        train(configured(task, models, folder).model_copy(update={"output": str(found[task])}))
    return found


@pytest.fixture
def opened(runs: dict[str, Path]) -> OpenedRun:
    return open_run(runs["seq_cls"])


def reviews(n: int = 11) -> list[dict[str, Any]]:
    """Rows with columns of their own, one of them without text."""
    rows = [
        {"id": i, "text": row["text"], "label": "right", "more": f"a,{i}"}
        for i, row in enumerate(rows_of("seq_cls", n))
    ]
    rows[3]["text"] = ""
    return rows


def test_rows_keep_their_order_and_columns_in_every_format(opened: OpenedRun, tmp_path: Path) -> None:
    rows = reviews()
    source = write_jsonl(tmp_path / "all.jsonl", rows)
    expected = iter([p.values() for p in predict(opened, [row["text"] for row in rows if row["text"]])])
    wanted: list[dict[str, Any]] = []
    for row in rows:
        answer = next(expected) if row["text"] else {"label": None, "probability": None}
        wanted.append(row | {f"predicted_{name}": answer[name] for name in ("label", "probability")})
    for ending in ("jsonl", "csv", "tsv", "parquet"):
        assert predict_file(opened, str(source), tmp_path / f"out.{ending}") == len(rows)
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == wanted
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == wanted
    for ending, delimiter in (("csv", ","), ("tsv", "\t")):
        with (tmp_path / f"out.{ending}").open(encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file, delimiter=delimiter))
        assert table == [{name: "" if value is None else str(value) for name, value in row.items()} for row in wanted]
    assert not list(tmp_path.glob("*.partial"))


def test_a_stopped_run_goes_on_behind_the_last_whole_line(
    opened: OpenedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS", 4)
    source, output = write_jsonl(tmp_path / "all.jsonl", reviews()), tmp_path / "out.jsonl"
    predict_file(opened, str(source), tmp_path / "whole.jsonl")

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError, match="Stopped after 4 rows"):
        predict_file(opened, str(source), output, progress=stop)
    partial = tmp_path / "out.jsonl.partial"
    assert not output.exists() and len(partial.read_text().splitlines()) == 5
    with partial.open("a") as file:
        file.write('{"id": 4, "te')  # as a crash leaves it
    seen: list[int] = []
    predict_file(opened, str(source), output, progress=seen.append)
    assert seen == [8, 11]
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not partial.exists()


def test_what_is_there_is_not_overwritten(opened: OpenedRun, tmp_path: Path) -> None:
    source, output = write_jsonl(tmp_path / "all.jsonl", reviews()), tmp_path / "out.jsonl"
    output.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        predict_file(opened, str(source), output)
    assert output.read_text() == "mine"
    (tmp_path / "b.csv.partial").write_text('{"run": "another"}\n{"id": 1}\n')
    with pytest.raises(OutputError, match="of another run, of other data or of other options"):
        predict_file(opened, str(source), tmp_path / "b.csv")
    assert len((tmp_path / "b.csv.partial").read_text().splitlines()) == 2
    with pytest.raises(ConfigError, match=r"must end with one of \.csv"):
        predict_file(opened, str(source), tmp_path / "b.xlsx")
    with pytest.raises(OutputError, match="There is no folder"):
        predict_file(opened, str(source), tmp_path / "none" / "b.csv")


def test_stopped_before_the_first_rows(opened: OpenedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is named that is not there."""

    def stop(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "predict", stop)
    source = write_jsonl(tmp_path / "all.jsonl", reviews())
    with pytest.raises(InterruptedRunError, match="before the first rows were written"):
        predict_file(opened, str(source), tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["all.jsonl"]


def test_a_number_that_parquet_has_no_type_for(opened: OpenedRun, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", [{"text": "the film", "n": 2**70}])
    with pytest.raises(OutputError, match="the column 'n' cannot be written"):
        predict_file(opened, str(source), tmp_path / "out.parquet")
    assert (tmp_path / "out.parquet.partial").exists()


@pytest.mark.parametrize("blank", ["", "  ", "\u3000", None])
def test_a_blank_row_of_a_reward(blank: str | None, runs: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"prompt": "say one", "completion": "one"}, {"prompt": "say one", "completion": blank}]
    source = write_jsonl(tmp_path / "all.jsonl", [*rows, rows[0]])
    predict_file(open_run(runs["reward"]), str(source), tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    first, second, third = (row["predicted_reward"] for row in found)
    assert first == third is not None and second is None


def test_rows_with_unlike_columns(opened: OpenedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 2)
    rows = [{"text": "the film"}, {"text": "good", "id": 1}, {"text": "bright", "id": 2.5, "tags": ["a"]}]
    source = write_jsonl(tmp_path / "all.jsonl", rows)
    predict_file(opened, str(source), tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["id"] for row in found] == [None, 1.0, 2.5] and found[2]["tags"] == ["a"]
    write_jsonl(
        tmp_path / "mixed.jsonl", [{"text": "good", "id": 1}, {"text": "good", "id": "one"}, {"text": "a", "id": {}}]
    )
    with pytest.raises(OutputError, match="the column 'id' cannot be written"):
        predict_file(opened, str(tmp_path / "mixed.jsonl"), tmp_path / "mixed.parquet")
    (tmp_path / "mixed.parquet.partial").rename(tmp_path / "kept.jsonl.partial")
    seen: list[int] = []
    assert predict_file(opened, str(tmp_path / "mixed.jsonl"), tmp_path / "kept.jsonl", progress=seen.append) == 3
    assert not seen  # nothing was predicted again
    taken = write_jsonl(tmp_path / "taken.jsonl", [{"text": "good", "predicted_label": "pos"}])
    with pytest.raises(OutputError, match="has a column 'predicted_label' already"):
        predict_file(opened, str(taken), tmp_path / "taken.csv")


def test_a_refused_file_leaves_nothing_in_the_way(opened: OpenedRun, tmp_path: Path) -> None:
    source, output = write_jsonl(tmp_path / "all.jsonl", [{"other": "a"}]), tmp_path / "out.jsonl"
    with pytest.raises(DataError, match="has no column 'text'"):
        predict_file(opened, str(source), output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.jsonl"]
    # an older version left such a file, without rows
    (tmp_path / "out.jsonl.partial").write_text('{"run": "a", "base": "b", "data": "c"}\n')
    write_jsonl(source, [{"text": "good"}])
    assert predict_file(opened, str(source), output) == 1 and not (tmp_path / "out.jsonl.partial").exists()


def test_a_table_without_rows_keeps_its_header(opened: OpenedRun, tmp_path: Path) -> None:
    (tmp_path / "none.csv").write_text("id,text\n")
    for ending in ("csv", "tsv", "jsonl", "parquet"):
        assert predict_file(opened, str(tmp_path / "none.csv"), tmp_path / f"out.{ending}") == 0
    assert (tmp_path / "out.csv").read_text() == "id,text,predicted_label,predicted_probability\n"
    assert pq.read_table(tmp_path / "out.parquet").column_names[:2] == ["id", "text"]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("task", ["token_cls", "question_ans", "several_labels", "number"])
def test_every_task_has_its_columns(task: str, runs: dict[str, Path], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", rows_of(task, 5))
    ended = run("predict", runs[task], "--data", source, "--output", tmp_path / "out.jsonl")
    assert ended.code == 0 and ended.out.splitlines()[-1].endswith("5 rows"), ended
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    answers = {f"predicted_{name}" for name, value in open_run(runs[task]).task.blank.items() if value != ""}
    assert all(answers <= row.keys() for row in rows)
    assert [{k: v for k, v in row.items() if k not in answers} for row in rows] == rows_of(task, 5)


def test_a_blank_prediction_has_the_keys_of_every_other(runs: dict[str, Path]) -> None:
    asked: dict[str, Any] = dict.fromkeys(runs, "a") | {
        "token_cls": ["a"],
        "question_ans": ("say", "a"),
        "reward": ("say", "a"),
    }
    for task, folder in runs.items():
        (found,) = predict(open_run(folder), [asked[task]])
        assert list(found.values()) == list(open_run(folder).task.blank)


def test_data_and_output_belong_together(runs: dict[str, Path], tmp_path: Path) -> None:
    for arguments in (("--data", "a.csv"), ("--output", "b.csv"), ("a text", "--data", "a.csv", "--output", "b.csv")):
        ended = run("predict", runs["seq_cls"], *arguments)
        assert ended.code == 2 and "--data and --output belong together" in ended.err
