"""Labels, columns and parts: what is taken for what, what is said of it, and what is refused."""

import json
import os
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from tiny import write_jsonl

from siliang.config import DataConfig
from siliang.data import example_set
from siliang.data.cache import prune, used
from siliang.data.cells import BadRow
from siliang.data.example_set import ExampleSet
from siliang.data.examples import Labelled, Span, Text
from siliang.data.label_cells import a_number, several_labels
from siliang.data.labels import alike, joined, strange
from siliang.data.load import Examples, load_examples, load_rows
from siliang.data.numbers import as_number, is_whole
from siliang.data.spec import DataSpec
from siliang.tasks import CAUSAL_LM, QUESTION_ANS, SEQ_CLS, TASKS
from siliang.types import DataError, TaskType

CLASSES = SEQ_CLS.data


def load(path: Path, content: str | None = None, task: DataSpec = CLASSES, **settings: Any) -> Examples:
    if content is not None:
        path.write_text(content)
    keep_going = settings.pop("keep_going", False)
    values = {"train": str(path), "test_size": 0.0} | settings
    return load_examples(DataConfig.model_validate(values), task, seed=0, keep_going=keep_going)


# ---- labels ----


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("1 000 527", "has '1 000 527' in 'label', a number with marks between its thousands: write it as 1000527"),
        ("1\u202f000,5", "write it as 1000.5"),
        ([0.3, 0.7], "has a list of 2 numbers in 'label', and classification.problem = number takes one number"),
    ],
)
def test_what_is_no_number(label: object, says: str) -> None:
    with pytest.raises(BadRow) as refused:
        a_number({"label": label}, "label")
    assert says in str(refused.value)


def test_probabilities_of_classes(tmp_path: Path) -> None:
    rows = [{"text": f"t {i}", "label": [0.3, 0.7]} for i in range(30)]
    spec = replace(CLASSES, several=True, read_label=partial(several_labels, separator=None))
    with pytest.raises(DataError, match=r"holds lists of numbers such as 0.3, 0.7: a probability for each class"):
        load(write_jsonl(tmp_path / "a.jsonl", rows), task=spec)


@pytest.mark.parametrize(
    "group",
    [
        ("a", "a "),
        ("a", "a\u200b"),
        ("a", "\ufeffa"),
        ("1", "1.0"),
        ("1", "01", "1e0"),
        ("Positive", "positive", "POSITIVE"),
        ("pos", "\uff50\uff4f\uff53"),
        ("1", "\uff11", "①"),
        ("2", "²"),
        ("caf\u00e9", "cafe\u0301"),
        ("very good", "very  good", "very\u3000good"),
        ("pos", '"pos"'),
        ("stra\u00dfe", "STRASSE"),
    ],
)
def test_names_that_look_like_one(group: tuple[str, ...]) -> None:
    assert alike([*group, "other"]) == [sorted(group)]


def test_names_that_are_several() -> None:
    assert alike(["1", "10", "-1", "+", "a", "b", "B-X", "I-X", "O", "0", "1.5", "好", "坏", "c#", "c++"]) == []
    assert strange(["nan", "None", "NA", " a", "b\u200b", "no", "O"]) == [" a", "NA", "None", "b\u200b", "nan"]
    assert joined(["action", "comedy", "drama", "action,comedy", "comedy,drama", "action,drama"]) == ","
    assert joined(["1 0 1", "0 1 1", "1 1 1", "0 0 0"]) == " "
    for words in (["New York, NY", "Paris", "Rome"], ["very good", "good", "bad", "very bad"], ["a/b", "c", "a"]):
        assert joined(words) is None
    assert [is_whole(n) for n in ("0", "-12", "①", "²", "--5", "", "-", "1.0", "１")] == [True, True] + [False] * 7


def test_what_is_a_number(tmp_path: Path) -> None:
    assert [as_number(n) for n in ("1", "-1.5", ".5", "1e3")] == [1.0, -1.5, 0.5, 1000.0]
    assert [as_number(n) for n in ("1_000", "nan", "inf", "1e999", " 1", "", "１")] == [None] * 7
    # the only column beside the label is its text, unless it holds numbers
    assert load(tmp_path / "d.csv", "words,label\n1_000,x\nnan,y\n").says_columns.startswith("text-label: text from")
    with pytest.raises(DataError, match="no column 'text'"):
        load(tmp_path / "d.csv", "words,label\n 1.5,x\n2,y\n")


@pytest.mark.parametrize("labels", [None, ["neg", "pos"]])
def test_labels_of_strange_digits_do_not_crash(labels: list[str] | None, tmp_path: Path) -> None:
    content = "text,label\na,①\nb,②\nc,²\nd,--5\n"
    if labels is None:
        assert load(tmp_path / "d.csv", content).labels == ["--5", "²", "①", "②"]
    else:
        with pytest.raises(DataError, match=r"d.csv:2 has the label '①', which is not one of neg, pos"):
            load(tmp_path / "d.csv", content, labels=labels)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": ["z"]}], "has a list in 'label': several labels"),
        (
            [{"text": "a", "label": 0.5}, {"text": "b", "label": 3}],
            "holds numbers such as 0.5: set .*problem=number",
        ),
        ([{"text": f"t{i}", "label": f"id{i}"} for i in range(30)], "30 different values in 30 rows, .* not classes"),
        ([{"text": "a", "label": "['x', 'y']"}, {"text": "b", "label": "['x']"}], "'label' holds lists such as"),
        ([{"text": "a", "label": {"k": 1}}, {"text": "b", "label": "x"}], "d.jsonl:1 has an object in 'label'"),
        ([{"text": ["a"], "label": "y"}, {"text": "b", "label": "x"}], "d.jsonl:1 has a list in 'text'"),
        ([{"text": "a", "label": None}, {"text": "b", "label": None}], "not one row can be used: .*an empty 'label'"),
        (
            [{"text": "a", "score": 0.5}],
            "'score' holds numbers such as 0.5.*\n.*data.columns.label=score",
        ),
        (
            [{"review": "a", "score": 2}],
            "'score' holds numbers such as 2.*\n.*data.columns.label=score",
        ),
        (
            [{"text": "a", "genres": ["x", "y"]}],
            "'genres' holds lists.*\n.*data.columns.label=genres",
        ),
    ],
)
def test_columns_that_hold_no_classes(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as raised:
        load(write_jsonl(tmp_path / "d.jsonl", rows))
    assert len(str(raised.value).splitlines()) <= 2


def test_no_number(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a", "label": NaN, "n": NaN}\n{"text": "b", "label": "y", "n": NaN}\n')
    with pytest.raises(DataError, match=r"1 row is bad: .*d.jsonl:1 has NaN in 'label'"):
        load(tmp_path / "d.jsonl")


def test_classes_said_by_the_user_are_believed(tmp_path: Path) -> None:
    content = "text,label\na,0.5\nb,1.5\n"
    assert load(tmp_path / "d.csv", content, labels=["0.5", "1.5"]).labels == ["0.5", "1.5"]
    with pytest.raises(DataError, match=r"has the label 'B', which is not one of a, b; it looks like 'b'"):
        load(tmp_path / "d.csv", "text,label\nx,a\ny,B\n", labels=["a", "b"])


# ---- columns ----


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("cat,label,review", "text-label: text from 'review', 'label'; not used: 'cat'"),
        ("label,review", "text-label: text from 'review', 'label'"),
        ("id,text,label,date", "text-label: 'text', 'label'; not used: 'id', 'date'"),
        ("label,words", "text-label: text from 'words', 'label'"),
    ],
)
def test_what_is_taken_and_what_is_not(header: str, says: str, tmp_path: Path) -> None:
    cells = {"label": ("x", "y"), "review": ("good", "bad"), "text": ("good", "bad"), "words": ("good", "bad")}
    rows = [",".join(cells.get(name, ("7", "8"))[i] for name in header.split(",")) for i in (0, 1)]
    found = load(tmp_path / "d.csv", "\n".join([header, *rows]))
    assert list(found.train) == [Labelled("good", "x"), Labelled("bad", "y")]
    assert found.says_columns == says


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("note,kind", "no column 'text'; it has 'note', 'kind'.\n.*data.columns.text=NAME data.columns.label=NAME"),
        ("Text,Label", "no column 'text'; it has 'Text', 'Label'.\n.*data.columns.text=Text data.columns.label=Label"),
        ("txt,label,id", "no column 'text'; it has 'txt', 'label', 'id'.\n.*data.columns.text=txt"),
        ("review,content,label", "no column 'text'; it has 'review', 'content', 'label'.\n.*data.columns.text=review"),
        ("id,label", "no column 'text'; it has 'id', 'label'.\n"),
        ("text,class", "no column 'label'; it has 'text', 'class'.\n.*data.columns.label=class"),
    ],
)
def test_columns_that_are_not_there(header: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as raised:
        load(tmp_path / "d.csv", f"{header}\n{','.join('1234'[: header.count(',') + 1])}\n")
    assert "Did you mean" not in str(raised.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("text1,text2,label", "data.columns.text=text1 data.columns.text_pair=text2;"),
        ("text_1,text_2,label", "data.columns.text=text_1 data.columns.text_pair=text_2;"),
        (
            "question1,question2,is_duplicate",
            "data.columns.text=question1 data.columns.text_pair=question2 data.columns.label=is_duplicate;",
        ),
        (
            "id,qid1,qid2,question1,question2,is_duplicate",
            "data.columns.text=question1 data.columns.text_pair=question2 data.columns.label=is_duplicate;",
        ),
    ],
)
def test_both_texts_of_a_pair_are_named(header: str, message: str, tmp_path: Path) -> None:
    cells = ["1" if name.startswith(("id", "qid", "score")) else "one two" for name in header.split(",")]
    with pytest.raises(DataError, match=re.escape(f"Name the columns with {message}")):
        load(tmp_path / "d.csv", f"{header}\n{','.join(cells)}\n")


@pytest.mark.parametrize(
    ("header", "texts"),
    [
        ("index,question,sentence,label", ("question", "sentence")),
        ("query,text,label", ("query", "text")),
        ("question,text,label", ("question", "text")),
        ("label,text,query", ("query", "text")),
    ],
)
def test_a_question_and_a_text_are_a_pair(header: str, texts: tuple[str, str], tmp_path: Path) -> None:
    names = header.split(",")
    rows = [{name: f"{name} {i}" for name in names} | {"label": "xy"[i]} for i in (0, 1)]
    found = load(write_jsonl(tmp_path / "d.jsonl", rows))
    assert list(found.train) == [Labelled(f"{texts[0]} {i}", "xy"[i], f"{texts[1]} {i}") for i in (0, 1)]
    alone = load(tmp_path / "d.jsonl", layout="text-label")
    assert [e.pair for e in alone.train] == [None, None]  # type: ignore[union-attr]


def test_columns_beside_an_instruction_that_go_by_another_name(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "who", "context": "a passage", "output": "me"},
        {"question": "who", "context": "a passage", "answer": "me"},
        {"id": "0", "system_prompt": "be nice", "prompt": "who", "completion": "me"},
        {"system_prompt": "be nice", "messages": [{"role": r, "content": r} for r in ("user", "assistant")]},
    ]
    said = []
    for row in rows:
        found = load(write_jsonl(tmp_path / "d.jsonl", [row]), task=CAUSAL_LM.data)
        said.append([(m.role, m.text) for m in found.train[0].messages])  # type: ignore[union-attr]
        assert not found.unused_texts
    assert said == [
        [("user", "who\na passage"), ("assistant", "me")],
        [("user", "who\na passage"), ("assistant", "me")],
        [("system", "be nice"), ("user", "who"), ("assistant", "me")],
        [("system", "be nice"), ("user", "user"), ("assistant", "assistant")],
    ]


LONG = [f"the {w} story was good" for w in ("one", "two")]
AB: dict[str, Any] = {"text": ["a", "b"], "label": ["x", "y"]}
ASKED: dict[str, Any] = {"instruction": ["say a", "say b"], "output": ["a b", "c d"]}
AGAIN = ["## say a : a b", "## say b : c d"]  # the row once more, written out


@pytest.mark.parametrize(
    ("task", "row", "column"),
    [
        ("seq_cls", AB | {"title": LONG}, "title"),
        ("seq_cls", AB | {"说明": ["一二三四五六七八九十甲乙", "甲乙" * 6]}, "说明"),
        ("causal_lm", {"text": LONG, "prompt": ["a", "b"], "completion": ["c", "d"]}, "text"),
        ("causal_lm", ASKED | {"input": ["", ""], "context": ["c", "d"]}, "context"),
        ("causal_lm", {"input": ["a", "b"], "output": ["a", "b"], "context": ["c", "d"]}, "context"),
        ("causal_lm", {"text": ["a", "b"], "summary": LONG}, "summary"),
        ("seq_cls", AB | {"date": ["1 May 2024", "2 May 2024"], "id": ["p", "q"]}, None),
        ("seq_cls", AB | {"licence": ["all rights reserved"] * 2}, None),
        ("causal_lm", ASKED | {"text": AGAIN}, None),
    ],
)
def test_running_text_that_is_not_used(
    task: str, row: dict[str, list[str]], column: str | None, tmp_path: Path
) -> None:
    rows = [{name: cells[i] for name, cells in row.items()} for i in (0, 1)]
    found = load(write_jsonl(tmp_path / "d.jsonl", rows), task=TASKS[TaskType(task.upper())].data)
    assert found.unused_texts == ([] if column is None else [column])


def test_an_answer_by_another_name_is_proposed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.columns.output=response;"):
        load(tmp_path / "d.csv", "instruction,context,response\na,b,c\n", task=CAUSAL_LM.data)


def test_sources_of_two_layouts(tmp_path: Path) -> None:
    pair = write_jsonl(tmp_path / "p.jsonl", [{"sentence1": "a", "sentence2": "b", "label": "x"}])
    one = write_jsonl(tmp_path / "o.jsonl", [{"text": "a", "label": "y"}])
    with pytest.raises(DataError, match=r"o.jsonl has the layout text-label, and the data before it sentence-pair"):
        load(pair, train=[str(pair), str(one)])


def test_pairs_among_single_texts(tmp_path: Path) -> None:
    """Which layout it is, the first row says; a second text further down was left out without a word."""
    for name in ("text_pair", "sentence2"):
        rows = [{"text": "a", "label": "x"}, {"text": "b", name: "c", "label": "y"}, {"text": "d", "label": "y"}]
        path = write_jsonl(tmp_path / "d.jsonl", rows)
        with pytest.raises(DataError, match=rf"d.jsonl:2 has a second text in '{name}', and the first row has none"):
            load(path)
        assert len(load(path, skip_bad_rows=True).train) == 2
        assert len(load(path, layout="text-label").train) == 3
        with pytest.raises(DataError, match=r"d.jsonl:2 has no field"):
            load(write_jsonl(tmp_path / "d.jsonl", [rows[1], rows[0], rows[2]]))
    rows = [{"text": "a", "label": "x"}, {"text": "b", "text_pair": None, "label": "y"}]
    assert len(load(write_jsonl(tmp_path / "d.jsonl", rows)).train) == 2


def test_other_data_is_read_as_the_runs_own(tmp_path: Path) -> None:
    like = {"sentence-pair": {"text": "sentence1", "text_pair": "sentence2", "label": "label"}}
    data = DataConfig(train="gone", labels=["x", "y"])
    pair = write_jsonl(tmp_path / "p.jsonl", [{"sentence1": "a", "sentence2": "b", "label": "x"}])
    assert list(load_rows(data, CLASSES, str(pair), like).eval) == [Labelled("a", "x", "b")]
    one = write_jsonl(tmp_path / "o.jsonl", [{"sentence1": "a", "label": "y"}])
    with pytest.raises(DataError, match=r"o.jsonl has no column 'sentence2', which the run was trained on"):
        load_rows(data, CLASSES, str(one), like)
    like = {"text-label": {"text": "review", "label": "label"}}
    both = write_jsonl(tmp_path / "b.jsonl", [{"text": "a", "review": "b", "label": "y"}])
    assert list(load_rows(data, CLASSES, str(both), like).eval) == [Labelled("b", "y")]


# ---- parts ----


def parts(folder: Path, **rows: int) -> Path:
    saved: Any = {
        name: Dataset.from_list([{"text": f"{name} {i}", "label": "xy"[i % 2]} for i in range(n)])
        for name, n in rows.items()
    }
    DatasetDict(saved).save_to_disk(folder / "saved")
    return folder / "saved"


def test_parts_that_are_not_used_are_named(tmp_path: Path) -> None:
    path = parts(tmp_path, train=6, test=3, validation=2)
    found = load(path, test_size=0.1)
    assert len(found.eval) == 3
    assert found.notes[1] == f"{path}: not used: its part 'validation'"
    other = write_jsonl(tmp_path / "e.jsonl", [{"text": "a", "label": "x"}])
    assert load(path, eval=str(other)).notes == [f"{path}: not used: its part 'test', 'validation'"]


@pytest.mark.parametrize("name", ["test", "validation", "dev"])
def test_a_folders_own_part_is_held_out(name: str, tmp_path: Path) -> None:
    path = parts(tmp_path, train=6, **{name: 3})
    found = load(path, test_size=0.5)
    assert (len(found.train), len(found.eval)) == (6, 3)
    assert found.notes == [f"{path}: its part {name!r} is held out"]
    none = load(path, test_size=0.0)
    assert (len(none.train), len(none.eval)) == (6, 0)
    assert none.notes == [f"{path}: not used: its part {name!r}"]
    assert len(load_rows(DataConfig(train="gone", labels=["x", "y"]), CLASSES, str(path)).eval) == 3


def test_a_part_whose_classes_are_hidden(tmp_path: Path) -> None:
    """As GLUE's test parts are: all classes are -1."""
    names = ClassLabel(names=["x", "y"])
    made: Any = {
        part: Dataset.from_dict({"text": ["a", "b"], "label": labels}).cast_column("label", names)
        for part, labels in (("train", [0, 1]), ("validation", [1, 0]), ("test", [-1, -1]))
    }
    DatasetDict(made).save_to_disk(tmp_path / "glue")
    found = load(tmp_path / "glue", test_size=0.1)
    assert list(found.eval) == [Labelled("a", "y"), Labelled("b", "x")]
    assert "not one row of its part 'test' can be used (each has an empty 'label')" in found.notes[0]


def test_held_out_rows_that_are_all_bad(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "d.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    bad = write_jsonl(tmp_path / "e.jsonl", [{"text": "", "label": "x"}] * 3)
    for keep_going in (False, True):
        with pytest.raises(DataError, match=r"e.jsonl: not one row can be used: .*:1 has an empty 'text', and so does"):
            load(good, eval=str(bad), skip_bad_rows=True, keep_going=keep_going)


def test_nested_questions_are_named_by_id(tmp_path: Path) -> None:
    questions = [
        {"id": "q-1", "question": "what", "answers": [{"text": "film", "answer_start": 4}]},
        {"id": "q-2", "question": " ", "answers": [{"text": "film", "answer_start": 4}]},
        {"id": "q-3", "question": "what", "answers": [{"text": "film", "answer_start": 3}]},
    ]
    content = json.dumps({"data": [{"title": "t", "paragraphs": [{"context": "the film", "qas": questions}]}]})
    path, task = tmp_path / "d.json", QUESTION_ANS.data
    with pytest.raises(DataError, match=r"1 row is bad: .*d.json, id q-2 has an empty 'question'"):
        load(path, content, task)
    found = load(path, content, task, skip_bad_rows=True)
    assert len(found.train) == 1
    assert found.skipped[1].endswith("id q-3 has the answer 'film', which is not at its start (3)")


# ---- what is kept ----


def test_spilled_rows_go_with_the_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SILIANG_CACHE", str(tmp_path))
    monkeypatch.setattr(example_set, "SPILL_BYTES", 500)
    old, long_ago = tmp_path / "rows-old", time.time() - 40 * 86400
    old.mkdir()
    os.utime(old, (long_ago, long_ago))
    many = ExampleSet.build((f"f:{i}", Text(f"row {i}")) for i in range(60))
    folders = list(tmp_path.glob("rows-*"))
    assert len(folders) > 1 and not old.exists()
    few = many[3:5]
    del many
    assert list(tmp_path.glob("rows-*")) == folders
    assert list(few) == [Text("row 3"), Text("row 4")]
    del few
    assert not list(tmp_path.glob("rows-*"))


def test_what_is_used_is_kept(tmp_path: Path) -> None:
    long_ago = time.time() - 40 * 86400
    for name in ("a-1", "a-2", "b-1"):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (long_ago, long_ago))
    used(tmp_path, "a-")
    prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-1", "a-2"]


@pytest.mark.parametrize("answer", [("", 57), (["film", ""], [4, 9])])
def test_an_empty_answer_at_a_place(answer: tuple[object, object], tmp_path: Path) -> None:
    """A damaged row is not a question without an answer."""
    answers = dict(zip(("text", "answer_start"), answer, strict=True))
    row = {"context": "the film was good", "question": "what", "answers": answers}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=r"has an empty answer at (57|9) in 'answers'"):
        load_examples(DataConfig(train=str(path), test_size=0.0), QUESTION_ANS.data, seed=0)


def test_an_answer_without_lists_and_none(tmp_path: Path) -> None:
    row = {"context": "the film was good", "question": "what"}
    answers = [("film", 4), ("", 0), ("", -1), ("", None), (["film", ""], [4, 0])]
    rows = [row | {"answers": {"text": text, "answer_start": start}} for text, start in answers]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = load_examples(DataConfig(train=str(path), test_size=0.0), QUESTION_ANS.data, seed=0).train
    assert [(e.answers, e.starts) for e in found if isinstance(e, Span)] == [
        (("film",), (4,)),
        ((), ()),
        ((), ()),
        ((), ()),
        (("film",), (4,)),
    ]
    write_jsonl(path, [row | {"answers": {"text": ["film"], "answer_start": []}}])
    with pytest.raises(DataError, match=r"as many texts as starts in 'answers' \(without an answer: two empty lists\)"):
        load_examples(DataConfig(train=str(path), test_size=0.0), QUESTION_ANS.data, seed=0)
