"""Reading: every bad line is named with its file, line and reason."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from siliang.config import Columns, DataConfig
from siliang.data.examples import Labelled, Text, conversation
from siliang.data.load import Examples, load_examples
from siliang.data.sources import read_rows, sha256
from siliang.types import DataError, TaskType


def load(path: Path, task: TaskType = TaskType.SEQ_CLS, **settings: object) -> Examples:
    return load_examples(DataConfig.model_validate({"train": str(path), "test_size": 0.0} | settings), task, seed=0)


ROWS = [{"text": "a, b", "label": "x"}, {"text": 'say "c"', "label": "y"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.json", json.dumps(ROWS)),
        ("d.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n"),
        ("d.csv", 'text,label\n"a, b",x\n"say ""c""",y\n'),
        ("d.csv", '\ufefftext,label\r\n"a, b",x\r\n"say ""c""",y\r\n'),
        ("d.tsv", 'text\tlabel\na, b\tx\nsay "c"\ty\n'),
    ],
)
def test_kinds_of_file(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", newline="")
    assert [row.values for row in read_rows(str(path))] == ROWS


def test_rows_on_one_line_are_named_by_number(tmp_path: Path) -> None:
    """json.dump writes a list on one line, which says nothing about its rows."""
    (tmp_path / "d.json").write_text(json.dumps([*ROWS, {"text": ""}]))
    path = str(tmp_path / "d.json")
    assert [row.where for row in read_rows(path)] == [f"{path}, row {n}" for n in (1, 2, 3)]
    (tmp_path / "d.json").write_text(json.dumps(ROWS, indent=1))
    assert [row.where for row in read_rows(path)] == [f"{path}:2", f"{path}:6"]


def test_header_given(tmp_path: Path) -> None:
    (tmp_path / "d.tsv").write_text('a, b\tx\nsay "c"\ty\n')
    assert [row.values for row in read_rows(str(tmp_path / "d.tsv"), header=["text", "label"])] == ROWS


def test_saved_data_sets(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "two")
    assert [row.values for row in read_rows(str(tmp_path / "one"))] == ROWS
    examples = load(tmp_path / "two", eval=str(tmp_path / "two"))
    assert (len(examples.train), len(examples.eval)) == (2, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "d.jsonl",
            '{"text": "a", "label": "x"}\n{"text": \n{"text": "b", "label": "y"}',
            r"d.jsonl:2 not valid JSON",
        ),
        (
            "d.jsonl",
            '{"text": "a", "label": "x"}\n[1]\n{"text": "b", "label": "y"}',
            r"d.jsonl:2 must be an object",
        ),
        (
            "d.jsonl",
            '{"text": " ", "label": "x"}\n{"text": "b", "label": "y"}',
            r"d.jsonl:1 has an empty 'text'",
        ),
        ("d.csv", "text,label\na,x\nb,y,z\nc,y\n", r"d.csv:3 has 3 columns, not 2 \(text, label\)"),
        ("d.csv", 'text,label\na,x\nb,y\n"c,y\n', r"d.csv:4 not readable as csv"),
        ("d.json", "[{}, ", "d.json:1: not valid JSON"),
        ("d.json", '{"text": "a"}\n{"text": "b"}', "name it .jsonl"),
        ("d.json", '{"text": "a"}', "must hold a list"),
        ("d.json", "[]", "holds no rows"),
        ("d.csv", "", "holds no rows"),
        ("d.csv", "text,label\n", "holds no rows"),
        ("d.xlsx", "x", "not a kind of file that can be read"),
        ("d.csv", "review,class\na,x\nb,y\n", r"has no column 'text'; it has 'review', 'class'"),
        ("d.csv", "text,label\na,x\nb,x\n", "one class only"),
    ],
)
def test_bad_data(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / name)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes("text,label\na,x\n你好,y\n".encode("gbk"))
    with pytest.raises(DataError, match=r"d.csv:3: not UTF-8"):
        load(tmp_path / "d.csv")


@pytest.mark.parametrize("source", ["missing.csv", "./missing", "/missing/folder"])
def test_missing_file(source: str) -> None:
    with pytest.raises(DataError, match="no data file"):
        read_rows(source)


def test_label_outside_the_set(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text,label\na,x\nb,y\nc,z\n")
    with pytest.raises(DataError, match=r"d.csv:4 has the label 'z', which is not one of x, y"):
        load(tmp_path / "d.csv", labels=["x", "y"])


def test_skipping_counts_and_lists(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text,label\na,x\n,y\nb,y\nc\n")
    examples = load(tmp_path / "d.csv", skip_bad_rows=True)
    assert examples.train == [Labelled("a", "x"), Labelled("b", "y")]
    assert [line.split(" ", 1)[0].rsplit(":", 1)[1] for line in examples.skipped] == ["3", "5"]


def test_instructions_texts_and_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"q": "add", "input": "1 2", "a": "3"}, {"q": "b", "input": None, "a": "c"}]))
    columns = Columns(instruction="q", output="a").model_dump()
    examples = load(path, TaskType.CAUSAL_LM, columns=columns)
    assert examples.train == [conversation("add", "3", "1 2"), conversation("b", "c")]
    path.write_text(json.dumps([{"text": "once"}]))
    assert load(path, TaskType.CAUSAL_LM).train == [Text("once")]


def test_held_out_rows_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text,label\n" + "".join(f"row {i},{'xy'[i % 2]}\n" for i in range(40)))
    one, two = (load(tmp_path / "d.csv", test_size=0.2) for _ in range(2))
    assert one == two
    assert len(one.eval) == 8
    assert not {e.text for e in one.train} & {e.text for e in one.eval}


def test_numeric_labels_in_order(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text,label\na,10\nb,2\nc,1\n")
    assert load(tmp_path / "d.csv").labels == ["1", "2", "10"]


def test_hash_follows_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("a")
    first = sha256([str(path)])
    path.write_text("b")
    assert sha256([str(path)]) != first
