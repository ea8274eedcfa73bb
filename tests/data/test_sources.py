"""Reading: every bad line is named with its file, line and reason."""

import collections
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, List
from reading import iter_rows, read_rows

from siliang.config import Columns, DataConfig
from siliang.data import json_stream
from siliang.data.examples import Labelled, Tagged, Text
from siliang.data.load import Examples, load_examples
from siliang.data.messages import conversation
from siliang.data.reading import DataRow, Reading
from siliang.data.sources import open_source
from siliang.data.spec import DataSpec
from siliang.tasks import CAUSAL_LM, SEQ_CLS, TOKEN_CLS
from siliang.types import DataError


def load(path: Path, task: DataSpec = SEQ_CLS.data, **settings: object) -> Examples:
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


TYPED = [
    {"text": "好 film", "label": 1, "n": None, "answers": {"text": ["好"], "answer_start": [0]}},
    {"text": "bad", "label": 0, "n": 2.5, "answers": {"text": [], "answer_start": []}},
]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "folder"])
def test_arrow_and_parquet(kind: str, tmp_path: Path) -> None:
    """Cells come as they are, lists, mappings and empty ones too; classes that have names come by name."""
    data = Dataset.from_list(TYPED)
    named = data.cast_column("label", ClassLabel(names=["neg", "pos"]))
    for number, made in enumerate((data, named)):
        path = tmp_path / f"d{number}.{kind}"
        if kind == "parquet":
            made.to_parquet(path)
        elif kind == "folder":
            made.save_to_disk(path)
        else:
            made.save_to_disk(tmp_path / f"saved{number}")
            shutil.copy(next((tmp_path / f"saved{number}").glob("*.arrow")), path)
        rows = read_rows(str(path))
        names = ({1: 1, 0: 0}, {1: "pos", 0: "neg"})[number]
        assert [row.values for row in rows] == [row | {"label": names[row["label"]]} for row in TYPED]  # type: ignore[index]
        assert [row.where for row in rows] == [f"{path}, row 1", f"{path}, row 2"]
        assert load(path).train == [Labelled(row["text"], str(names[row["label"]])) for row in TYPED]  # type: ignore[index,arg-type]


def test_tags_by_number_come_by_name(tmp_path: Path) -> None:
    tags = List(ClassLabel(names=["O", "B-X"]))
    data = Dataset.from_dict({"tokens": [["a", "b"]] * 2, "ner_tags": [[0, 1], [1, 0]]}).cast_column("ner_tags", tags)
    data.save_to_disk(tmp_path / "d")
    examples = load(tmp_path / "d", TOKEN_CLS.data)
    assert examples.labels == ["O", "B-X"]
    assert examples.train[0] == Tagged(("a", "b"), ("O", "B-X"))


def test_a_class_that_is_not_told_is_a_bad_row(tmp_path: Path) -> None:
    """Public test sets hide their labels as -1."""
    data = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, -1]})
    data.cast_column("label", ClassLabel(names=["x", "y"])).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d.parquet, row 3 has an empty 'label'"):
        load(tmp_path / "d.parquet")


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
def test_damaged_arrow_and_parquet(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PAR1 or not")
    with pytest.raises(DataError, match=rf"{name} is not a readable"):
        read_rows(str(tmp_path / name))


def test_saved_data_sets(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "two")
    assert [row.values for row in read_rows(str(tmp_path / "one"))] == ROWS
    examples = load(tmp_path / "two", eval=str(tmp_path / "two"))
    assert (len(examples.train), len(examples.eval)) == (2, 1)
    DatasetDict({"train": Dataset.from_list(ROWS), "validation": Dataset.from_list(ROWS[:1])}).save_to_disk(
        tmp_path / "three"
    )
    assert len(load(tmp_path / "three", eval=str(tmp_path / "three")).eval) == 1
    DatasetDict({"first": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "four")
    with pytest.raises(DataError, match="has no part 'train'; it has first"):
        read_rows(str(tmp_path / "four"))


@pytest.fixture
def files_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a data set's repository on the hub is: one file a part."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # no test asks the hub
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "test.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    return folder


def test_a_folder_of_files(files_of_a_hub: Path, tmp_path: Path) -> None:
    """As a clone of a repository is; `datasets` knows the parts by the files' names."""
    examples = load(files_of_a_hub, eval=str(files_of_a_hub))
    assert examples.train == [Labelled("a, b", "x"), Labelled('say "c"', "y")]
    assert examples.eval == [Labelled("a, b", "x")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no data:.*\n.*save_to_disk"):
        read_rows(str(tmp_path / "empty"))


def test_a_name_on_the_hub(files_of_a_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is a folder here, the rest is real."""
    asked: list[tuple[str, str | None]] = []
    real = datasets.load_dataset_builder

    def here(path: str, name: str | None = None) -> object:
        asked.append((path, name))
        return real(str(files_of_a_hub))

    monkeypatch.setattr(datasets, "load_dataset_builder", here)
    monkeypatch.setattr("siliang.data.sources._fetch", lambda file, _: Path(file))  # of the hub's cache
    assert [row.values for row in read_rows("owner/name:config")] == ROWS
    assert read_rows("owner/name", split="test")[0].where == "owner/name/test.jsonl:1"
    assert asked == [("owner/name", "config"), ("owner/name", None)]


def test_lines_under_the_other_name_on_the_hub(files_of_a_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can rename a file of somebody else's repository."""
    (files_of_a_hub / "train.jsonl").rename(files_of_a_hub / "train.json")
    (files_of_a_hub / "test.jsonl").unlink()
    real = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: real(str(files_of_a_hub)))
    monkeypatch.setattr("siliang.data.sources._fetch", lambda file, _: Path(file))
    assert [(row.values, row.where) for row in read_rows("owner/name")] == [
        (ROWS[0], "owner/name/train.json:1"),
        (ROWS[1], "owner/name/train.json:2"),
    ]
    with pytest.raises(DataError, match=r"name it .jsonl"):
        read_rows(str(files_of_a_hub))


def test_without_a_network_one_line_says_what_to_do(tmp_path: Path) -> None:
    command = ["check", "--model", tmp_path, "--task", "seq_cls", "--data", "nobody/no-such-data"]
    done = subprocess.run(
        [sys.executable, "-m", "siliang", *map(str, command)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert first.startswith(
        "error[SLE03]: nobody/no-such-data is not a file or folder here, and the hub did not give it"
    )
    assert second == "Look at its name and at the network, or save the data to a file (.jsonl, .parquet) and name that."


def test_several_files_and_their_weights(tmp_path: Path) -> None:
    """Held-out rows have no weight; a weight below 1 takes rows by chance, the same for the same seed."""
    for name, n in (("a", 40), ("b", 40)):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(f"{name}{i},{'xy'[i % 2]}\n" for i in range(n)))
    pattern = load(tmp_path / "*.csv")
    assert len(pattern.train) == 80
    sources = [str(tmp_path / "a.csv"), {"path": str(tmp_path / "b.csv"), "weight": 2.5}]
    whole, again = (load(tmp_path, train=sources, test_size=0.25) for _ in range(2))
    assert whole == again and len(whole.eval) == 20
    counts = collections.Counter(e.text for e in whole.train)  # type: ignore[union-attr]
    held = {e.text for e in whole.eval}  # type: ignore[union-attr]
    assert not held & set(counts) and len(held | set(counts)) == 80
    assert {n for text, n in counts.items() if text[0] == "a"} == {1}
    assert {n for text, n in counts.items() if text[0] == "b"} == {2, 3}


def test_a_stratified_split_holds_out_the_same_share(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text,label\n" + "".join(f"row {i},{'xxxy'[i % 4]}\n" for i in range(80)))
    examples = load(tmp_path / "d.csv", test_size=0.2, seed=123, stratify=True)
    for part, n in ((examples.train, 64), (examples.eval, 16)):
        assert collections.Counter(e.label for e in part) == {"x": n * 3 // 4, "y": n // 4}  # type: ignore[union-attr]


def test_a_large_file_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 2**16)
    path = tmp_path / "d.json"
    with path.open("w") as opened:
        opened.write("[" + ",\n".join(json.dumps({"text": "x" * 1000, "label": "y"}) for _ in range(4000)) + "]")
    tracemalloc.start()
    rows = iter_rows(str(path))
    n = sum(1 for _ in rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 4000 and path.stat().st_size > 4e6
    assert peak < 1e6


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
    (tmp_path / "d.csv").write_bytes("text,label\na,x\ncafé,y\n".encode("latin-1"))
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
    examples = load(path, CAUSAL_LM.data, columns=columns)
    assert examples.train == [conversation("add", "3", "1 2"), conversation("b", "c")]
    path.write_text(json.dumps([{"text": "once"}]))
    assert load(path, CAUSAL_LM.data).train == [Text("once")]


def test_held_out_rows_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text,label\n" + "".join(f"row {i},{'xy'[i % 2]}\n" for i in range(40)))
    one, two = (load(tmp_path / "d.csv", test_size=0.2) for _ in range(2))
    assert one == two
    assert len(one.eval) == 8
    assert not {e.text for e in one.train} & {e.text for e in one.eval}


def test_numeric_labels_in_order(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text,label\na,10\nb,2\nc,1\n")
    assert load(tmp_path / "d.csv").labels == ["1", "2", "10"]


@pytest.mark.parametrize(("name", "around"), [("d.jsonl", "{}\n"), ("d.json", "[{}]"), ("e.json", '{{"data": [{}]}}')])
def test_half_a_character(name: str, around: str, tmp_path: Path) -> None:
    """What JSON can write and UTF-8 cannot; a pair of halves is a character."""
    (tmp_path / name).write_text(around.format('{"text": "\\ud83d\\ude00", "label": "a"}'))
    assert read_rows(str(tmp_path / name))[0].values["text"] == "\U0001f600"
    (tmp_path / name).write_text(around.format('{"text": "a\\ud83d", "label": "a"}'))
    assert read_rows(str(tmp_path / name))[0].problem == "holds half of a character, \\ud83d"


def tagged_rows(path: Path, content: str) -> tuple[list[DataRow], list[str]]:
    path.write_text(content)
    reading = Reading(tagged=True)
    return list(open_source(str(path), reading).rows("", reading)), reading.notes


def test_comments_and_numbers_of_words_are_no_words(tmp_path: Path) -> None:
    head = "# newdoc id = a\n# sent_id = 3\n# text = EU rejects\n"
    words = [{"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}, {"tokens": ["#", "#a"], "tags": ["O", "X"]}]
    rows, notes = tagged_rows(tmp_path / "a.conll", f"{head}EU B-ORG\nrejects O\n\n# sent_id = 4\n# O\n#a X\n")
    assert [r.values for r in rows] == words and not notes
    numbered = f"{head}1\tEU\tB-ORG\n2\trejects\tO\n\n# sent_id = 4\n1-2\t##a\t_\n1\t#\tO\n2\t#a\tX\n"
    rows, notes = tagged_rows(tmp_path / "a.conll", numbered)
    assert [r.values for r in rows] == words and "its first column numbers the words" in notes[0]
    # a sentence of numbers, beside others
    rows, _ = tagged_rows(tmp_path / "a.conll", "1\tx\tO\n2\tx\tO\n\nEU\tx\tO\n")
    assert [r.values["tokens"] for r in rows] == [["1", "2"], ["EU"]]
    full = "1\tEU\teu\tPROPN\t_\t_\t2\tnsubj\t_\t_\n2\trejects\treject\tVERB\t_\t_\t0\troot\t_\t_\n"
    with pytest.raises(DataError, match=r"10 columns that start with a word's number, .* \(of CoNLL-U 2 and 4"):
        tagged_rows(tmp_path / "a.conll", head + full)
    with pytest.raises(DataError, match=r"its first column numbers the words, and no other holds them"):
        tagged_rows(tmp_path / "a.bio", "1\tO\n2\tB-X\n")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "# export of 2024\ntext,label\na,x\n", "a.csv:1: '# export of 2024' is a comment, not a header"),
        ("a.csv", "# export, all of it\ntext,label\na,x\n", "a.csv:1: '# export' is a comment"),
        ("a.csv", "sep=;\ntext;label\na;x\n", "a.csv:1: 'sep=' is a mark of Excel's and no header line: take"),
        ("a.csv", "sep=,\ntext,label\na,x\n", "a.csv:1: 'sep=' is a mark of Excel's and no header line: take"),
        ("a.csv", "text,label\na, b,x\nc,y\nd,x\n", "has 3 columns, not 2 .text, label.; a cell with a comma"),
        ("a.json", '{"text": {"0": "a", "1": "b"}, "label": {"0": 1, "1": 0}}', 'to_json\\(path, orient="records"\\)'),
    ],
)  # fmt: skip
def test_files_that_programs_write_otherwise(name: str, content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=said) as raised:
        load_examples(DataConfig(train=str(path), test_size=0), SEQ_CLS.data, seed=0)
    assert str(raised.value).count("\n") < 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "tokens,tags\na b,O O\n", r"must hold lists in 'tokens' and 'tags', and holds text: write .jsonl"),
        ("a.jsonl", '{"text": "hello Bob", "label": [[6, 9, "PER"]]}', r"'label' holds spans of a text: .* so"),
        ("a.jsonl", '{"text": "hello Bob", "entities": [{"start": 6}]}', r"'entities' holds spans of a text"),
    ],
)  # fmt: skip
def test_tags_that_are_none(name: str, content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=said):
        load_examples(DataConfig(train=str(path), test_size=0), TOKEN_CLS.data, seed=0)
