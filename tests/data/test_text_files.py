"""Encodings, separators, quotes and line ends: found where they are certain, and said; otherwise an error says so."""

import json
from pathlib import Path

import pytest

from siliang.config import DataConfig
from siliang.data.examples import Labelled
from siliang.data.load import Examples, load_examples
from siliang.tasks import SEQ_CLS
from siliang.types import DataError

TABLE = "text,label\n你好，世界,好\n再见,坏\n"
READ = [Labelled("你好，世界", "好"), Labelled("再见", "坏")]
SIMPLE = [Labelled("a", "x"), Labelled("b", "y")]


def load(path: Path, content: str | bytes, **settings: object) -> Examples:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    values = {"train": str(path), "test_size": 0.0} | settings
    return load_examples(DataConfig.model_validate(values), SEQ_CLS.data, seed=0)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_marks_and_utf8_say_the_encoding(encoding: str, tmp_path: Path) -> None:
    found = load(tmp_path / "d.csv", TABLE.encode(encoding))
    assert (list(found.train), found.notes) == (READ, [])


@pytest.mark.parametrize("name", ["d.csv", "d.jsonl", "d.json", "d.tsv"])
def test_chinese_that_is_not_utf8_is_read_and_said(name: str, tmp_path: Path) -> None:
    rows = [{"text": e.text, "label": e.label} for e in READ]
    contents = {
        "d.csv": TABLE,
        "d.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "d.json": json.dumps(rows, ensure_ascii=False),
        "d.tsv": TABLE.replace(",", "\t"),
    }
    found = load(tmp_path / name, contents[name].encode("gbk"))
    assert list(found.train) == READ
    assert found.notes == [f"{tmp_path / name}: not UTF-8; read as gb18030 (data.encoding sets another)"]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Téa, un café à Élan", "latin-1"),
        ("привет мир как дела", "cp1251"),
        ("これはテストです", "shift_jis"),
        ("這個酒店非常不錯，我們很喜歡", "big5"),
    ],
)
def test_no_other_encoding_is_guessed(text: str, encoding: str, tmp_path: Path) -> None:
    content = f"label;text\nx;{text}\ny;b\n".encode(encoding)
    with pytest.raises(DataError, match=r"d.csv:2: not UTF-8 text. Say what it is with data.encoding"):
        load(tmp_path / "d.csv", content)
    assert load(tmp_path / "d.csv", content, encoding=encoding).train[0] == Labelled(text, "x")


def test_utf16_without_its_mark(tmp_path: Path) -> None:
    content = "text,label\nhello,x\nb,y\n".encode("utf-16-le")
    with pytest.raises(DataError, match=r"say data.encoding=utf-16-le"):
        load(tmp_path / "d.csv", content)
    assert load(tmp_path / "d.csv", content, encoding="utf-16-le").train[0] == Labelled("hello", "x")
    with pytest.raises(DataError, match=r"d.csv:3: not utf-8 text, which data.encoding says"):
        load(tmp_path / "d.csv", b"text,label\na,x\n\xff,y\n", encoding="utf-8")
    for name, value in (("encoding", "utf-9"), ("encoding", "base64"), ("separator", ";;"), ("separator", '"')):
        with pytest.raises(ValueError, match=f"data.{name} = "):
            DataConfig.model_validate({"train": "d.csv", name: value})


def test_utf8_is_not_read_as_what_a_setting_says(tmp_path: Path) -> None:
    """UTF-8 decodes as GB18030 and as Latin-1, to other words."""
    content = f"text,label\n{'房间很干净，服务也好，' * 3},x\nb,y\n".encode()
    for encoding in ("gb18030", "latin-1"):
        with pytest.raises(DataError, match=r"d.csv(:2: not|\ is UTF-8, and data.encoding says) "):
            load(tmp_path / "d.csv", content, encoding=encoding)


@pytest.mark.parametrize(
    ("name", "content", "separator"),
    [
        ("d.csv", "text;label\na;x\nb;y\n", "a semicolon"),
        ("d.csv", "text\tlabel\na\tx\nb\ty\n", "a tab"),
        ("d.csv", "text|label\na|x\nb|y\n", "a bar"),
        ("d.tsv", "text,label\na,x\nb,y\n", "a comma"),
    ],
)
def test_separators(name: str, content: str, separator: str, tmp_path: Path) -> None:
    found = load(tmp_path / name, content)
    assert list(found.train) == SIMPLE
    assert found.notes == [f"{tmp_path / name}: its columns are separated by {separator} (data.separator sets another)"]


def test_a_separator_that_is_given(tmp_path: Path) -> None:
    assert load(tmp_path / "d.csv", "text;label\na,1;x\nb;y\n").train[0] == Labelled("a,1", "x")
    with pytest.raises(DataError, match=r"has no column 'text'; it has 'text;label'.\n.*data.separator=';'"):
        load(tmp_path / "d.csv", "text;label\na;x\nb;y\n", separator=",")
    quoted = load(tmp_path / "d.tsv", 'text\tlabel\n"a"\tx\nb\ty\n', separator="tab")
    assert (list(quoted.train), quoted.doubts) == (SIMPLE, [])


@pytest.mark.parametrize(
    ("content", "first", "doubtful"),
    [
        ('text\tlabel\n"say ""hi""\tto me"\tx\nb\ty\n', 'say "hi"\tto me', False),  # only a program writes that
        ('text\tlabel\n"two\nlines"\tx\nb\ty\n', "two\nlines", False),
        ('"text"\t"label"\n"a"\t"x"\n"b"\t"y"\n', "a", False),
        ('text\tlabel\n"good film"\tx\nb\ty\n', '"good film"', True),
        ('text\tlabel\n"unpaired\tx\nb\ty\n', '"unpaired', False),
        ('text\tlabel\n"one" or "two"\tx\nb\ty\n', '"one" or "two"', False),
    ],
)
def test_quotes_in_tsv(content: str, first: str, doubtful: bool, tmp_path: Path) -> None:
    found = load(tmp_path / "d.tsv", content)
    assert found.train[0] == Labelled(first, "x")
    assert bool(found.doubts) == doubtful


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(end: str, tmp_path: Path) -> None:
    for name, content in (
        ("d.csv", "text,label\na,x\nb,y\n"),
        ("d.tsv", "text\tlabel\na\tx\nb\ty\n"),
        ("d.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'),
    ):
        assert list(load(tmp_path / name, content.replace("\n", end)).train) == SIMPLE


def test_quoted_line_ends_stay(tmp_path: Path) -> None:
    assert load(tmp_path / "d.csv", 'text,label\r\n"a\r\nb",x\r\nb,y\r\n').train[0] == Labelled("a\r\nb", "x")


def test_headers(tmp_path: Path) -> None:
    assert list(load(tmp_path / "d.csv", "\ufeff text ,\u200blabel\na,x\nb,y\n", encoding="utf-8").train) == SIMPLE
    assert list(load(tmp_path / "d.csv", ",text,label,\n0,a,x,\n1,b,y,\n").train) == SIMPLE  # pandas' index
    with pytest.raises(DataError, match=r"d.csv:1: the header names the column 'text' twice"):
        load(tmp_path / "d.csv", "text,label,text\na,x,c\nb,y,d\n")
    with pytest.raises(DataError, match=r"d.csv:1: is the header line that data.header says is missing"):
        load(tmp_path / "d.csv", "text,label\na,x\nb,y\n", header=["text", "label"])


def test_names_twice_in_an_object(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d.jsonl:1 not valid JSON: an object has the name 'text' twice"):
        load(tmp_path / "d.jsonl", '{"text": "a", "text": "c", "label": "y"}\n{"text": "b", "label": "x"}')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"} {"text": "b"}]', "a comma is missing between two items"),
        ('[{"text": "a"},, {"text": "b"}]', "Expecting value"),
        ('[{"text": "a"},\n{"text": "b"},]', "d.json:2: not valid JSON: a comma with nothing after it"),
        ('[, {"text": "a"}]', "Expecting value"),
        ('[{"text": "a"}', "the list does not end"),
        ('[{"text": "a"}] x', "there is more after the end of the list"),
    ],
)
def test_lists_that_are_no_json(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path / "d.json", content, layout="text-label", columns={"label": "text"})


def test_kinds_of_json_that_are_named_as_the_other(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    for content in (json.dumps(rows), json.dumps(rows, indent=1)):
        with pytest.raises(DataError, match=r"d.jsonl begins with a list, as a .json file does: name it .json"):
            load(tmp_path / "d.jsonl", content)
    with pytest.raises(DataError, match=r"It looks like one object a line: name it .jsonl"):
        load(tmp_path / "d.json", "\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="its objects go over several lines"):
        load(tmp_path / "d.jsonl", json.dumps(rows[0], indent=1))
    with pytest.raises(DataError, match="It holds one object, with a list under 'train', 'test'"):
        load(tmp_path / "d.json", json.dumps({"train": rows, "test": rows}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            'text,label\n"a,x\nb,y\nc,y\n',
            "d.csv:2 not readable as csv: a quote .* closes nowhere, and the 2 lines behind",
        ),
        ('text,label\n"he" said,x\nb,y\n', "d.csv:2 not readable as csv: ',' expected after"),
        ("text,label\na\rb,x\nb,y\n", "d.csv:2 not readable as csv: a carriage return inside of a cell"),
        ("text,label\na\nb,y\n", r"d.csv:2 has 1 column, not 2 \(text, label\)"),
        ("text,label\na,b,x\nb,y\n", r"d.csv:2 has 3 columns, not 2 \(text, label\)"),
        ("text,label\na\nb\n", "d.csv: not one row can be used: .*d.csv:2 has 1 column, .* so does each of the 2"),
        ("text,label\n", "holds no rows"),
    ],
)
def test_records_that_cannot_be_read(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path / "d.csv", content)
