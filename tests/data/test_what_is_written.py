"""What is written is what is learned, whatever kind of file it is written into and wherever that lies."""

import csv
import datetime
import decimal
import gzip
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from reading import read_rows

from siliang.config import DataConfig
from siliang.data.examples import Labelled
from siliang.data.load import load_examples
from siliang.data.messages import Conversation
from siliang.data.refused import media_in
from siliang.data.spec import DataSpec
from siliang.tasks import CAUSAL_LM, SEQ_CLS
from siliang.types import DataError

Rows = list[dict[str, Any]]

# no characters that a text file cannot hold, none that end its lines, and no text that is blank
CHARACTERS = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029\x85\ufeff")
ANY_TEXT = st.text(CHARACTERS, min_size=1, max_size=12)
# neither blank nor the place of a picture or a sound, which are refused
TEXTS = ANY_TEXT.filter(lambda t: bool(t.strip(" \xa0\u3000\u200b\u200c\u200d\u2060")) and media_in(t) is None)
# texts that a reader which guesses takes for something else
GUESSED = st.sampled_from(
    ["007", "1e3", "NA", "nan", "null", "None", "2024-05-01", "true", "1.0", "-", "0x10", "1_000", "12:30", "[1]", "{}",
     '"', '""', '"a"', "a,b", "a;b", "'", "\\n", "1,5", "#", "inf", "①", "١", "a\u200b"]
)  # fmt: skip
CELLS = st.one_of(GUESSED, TEXTS)


def in_json(folder: Path, rows: Rows) -> Path:
    return write(folder / "d.json", json.dumps(rows, ensure_ascii=False))


def in_jsonl(folder: Path, rows: Rows) -> Path:
    return write(folder / "d.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def in_csv(folder: Path, rows: Rows) -> Path:
    return write(folder / "d.csv", separated(rows))


def in_tsv(folder: Path, rows: Rows) -> Path:
    lines = ["\t".join(row) for row in [rows[0], *(row.values() for row in rows)]]
    return write(folder / "d.tsv", "\n".join(lines) + "\n")


def in_quoted_tsv(folder: Path, rows: Rows) -> Path:
    return write(folder / "d.tsv", separated(rows, delimiter="\t", quoting=csv.QUOTE_ALL))


def in_gz(folder: Path, rows: Rows) -> Path:
    path = folder / "d.csv.gz"
    path.write_bytes(gzip.compress(separated(rows).encode()))
    return path


def in_utf16(folder: Path, rows: Rows) -> Path:
    path = folder / "d.csv"
    path.write_bytes(separated(rows).encode("utf-16"))
    return path


def in_parquet(folder: Path, rows: Rows) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet")
    return folder / "d.parquet"


def in_arrow(folder: Path, rows: Rows) -> Path:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / "d.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return folder / "d.arrow"


def in_arrow_file(folder: Path, rows: Rows) -> Path:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / "d.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return folder / "d.arrow"


def saved(folder: Path, rows: Rows) -> Path:
    Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


def saved_parts(folder: Path, rows: Rows) -> Path:
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(folder / "parts")
    return folder / "parts"


def folder_of(inner: Callable[[Path, Rows], Path], name: str) -> Callable[[Path, Rows], Path]:
    """The file in a folder, as the repository of a data set is."""

    def write_it(folder: Path, rows: Rows) -> Path:
        made = inner(folder, rows)
        (folder / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, folder / "hub" / name)
        write(folder / "hub" / "README.md", "---\nlicense: mit\n---\n# Data\n")
        return folder / "hub"

    return write_it


SOURCES: dict[str, Callable[[Path, Rows], Path]] = {
    "json": in_json,
    "jsonl": in_jsonl,
    "csv": in_csv,
    "tsv": in_tsv,
    "quoted tsv": in_quoted_tsv,
    "gz": in_gz,
    "utf-16": in_utf16,
    "parquet": in_parquet,
    "arrow": in_arrow,
    "arrow file": in_arrow_file,
    "saved": saved,
    "saved parts": saved_parts,
    "folder of jsonl": folder_of(in_jsonl, "train.jsonl"),
    "folder of json": folder_of(in_json, "data.json"),
    "folder of csv": folder_of(in_csv, "train.csv"),
    "folder of tsv": folder_of(in_tsv, "train/d.tsv"),
    "hub of parquet": folder_of(in_parquet, "data/train-00000-of-00001.parquet"),
}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def separated(rows: Rows, **style: Any) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n", **style)
    writer.writerows([list(rows[0]), *(list(row.values()) for row in rows)])
    return out.getvalue()


@pytest.mark.parametrize("source", SOURCES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=4))
@example(pairs=[("007", "2024-05-01"), ("NA", "null"), ("1e3", "True"), ("a", "nan")])
@example(pairs=[('"quoted"', "one"), ('un"paired', 'two"')])
def test_texts(source: str, pairs: list[tuple[str, str]]) -> None:
    if "tsv" in source:  # plain lines: what such a file can hold, and no quotes of which nobody knows
        pairs = [(a, b) for a, b in pairs if '"' not in a + b] or [("a", "b")]
    rows = [{"instruction": a, "output": b} for a, b in pairs]
    with tempfile.TemporaryDirectory() as folder:
        path = SOURCES[source](Path(folder), rows)
        read = load_examples(DataConfig(train=str(path), test_size=0.0), CAUSAL_LM.data, seed=0).train
        assert [(e.messages[0].content, e.messages[1].content) for e in read if isinstance(e, Conversation)] == pairs
        many = load_examples(DataConfig(train=[*[str(path)] * 2], test_size=0.0), CAUSAL_LM.data, seed=0).train
        assert list(many) == [*read, *read]


LEAVES = st.one_of(st.integers(-(2**40), 2**40), st.booleans(), ANY_TEXT)
NAMES = st.sampled_from(["city", "a", "b", "unit", "days"])
ARGUMENTS = st.dictionaries(NAMES, LEAVES, max_size=3)


@pytest.mark.parametrize("source", ["json", "jsonl", "parquet", "arrow", "saved", "hub of parquet", "folder of jsonl"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(ARGUMENTS, min_size=2, max_size=4), kinds=st.data())
def test_calls_and_tools(source: str, calls: list[dict[str, Any]], kinds: st.DataObject) -> None:
    """A table gives each object the fields of all; what was not written is not learned."""
    of = {name: kinds.draw(st.sampled_from([int, bool, str])) for name in ("city", "a", "b", "unit", "days")}
    calls = [{k: v for k, v in call.items() if type(v) is of[k]} for call in calls]
    calls[0] = calls[0] or {"a": {int: 1, bool: True, str: "1"}[of["a"]]}
    rows = [call_row(n, arguments) for n, arguments in enumerate(calls)]
    with tempfile.TemporaryDirectory() as folder:
        path = SOURCES[source](Path(folder), rows)
        read = load_examples(DataConfig(train=str(path), test_size=0.0), CAUSAL_LM.data, seed=0).train
    for row, made, arguments in zip(rows, read, calls, strict=True):
        assert isinstance(made, Conversation)
        assert json.loads(made.messages[1].calls[0].arguments) == arguments
        assert json.loads(made.tools) == row["tools"]


def call_row(n: int, arguments: dict[str, Any]) -> dict[str, Any]:
    properties = {name: {"type": type(value).__name__} for name, value in arguments.items()} or {"none": {"type": "x"}}
    tool = {"name": f"t{n}", "parameters": {"type": "object", "properties": properties}}
    call = {"function": {"name": f"t{n}", "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": f"q{n}"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [call],
            },
            {"role": "tool", "content": "ok"},
            {"role": "assistant", "content": "done"},
        ],
        "tools": [tool | ({"description": "d"} if n % 2 else {})],
    }


@pytest.mark.parametrize(
    ("written", "learned"),
    [("1", "1"), ("0.10", "0.10"), ("1e-7", "1e-7"), ("1E5", "1E5"), ("true", "true"), ("100000000000000000000",) * 2],
)
def test_numbers_are_learned_as_they_are_written(written: str, learned: str, tmp_path: Path) -> None:
    row = f'{{"instruction": "n", "output": {written}}}'
    for name, text in (("d.jsonl", row), ("d.json", f"[{row}]")):
        read = load_examples(DataConfig(train=str(write(tmp_path / name, text)), test_size=0.0), CAUSAL_LM.data, seed=0)
        made = read.train[0]
        assert isinstance(made, Conversation) and made.messages[1].content == learned


def test_numbers_in_calls(tmp_path: Path) -> None:
    """As they are written, and none that JSON has no word for."""
    text = json.dumps(call_row(0, {"a": 1})).replace('{"a": 1}', '{"a": 0.10, "b": [1e5, -0.0, 12, "1\u00e9"]}')
    bad = text.replace("0.10", "NaN")
    config = DataConfig(train=str(write(tmp_path / "d.jsonl", f"{text}\n{bad}")), test_size=0.0, skip_bad_rows=True)
    found = load_examples(config, CAUSAL_LM.data, seed=0)
    made = found.train[0]
    assert isinstance(made, Conversation) and len(found.train) == 1 and "NaN" in found.skipped[0]
    assert made.messages[1].calls[0].arguments == '{"a": 0.10, "b": [1e5, -0.0, 12, "1\u00e9"]}'
    days = [call_row(0, {"a": datetime.date(2024, 5, d), "b": decimal.Decimal(f"1.{d}0")}) for d in (1, 2)]
    made = load_examples(DataConfig(train=str(in_parquet(tmp_path, days)), test_size=0.0), CAUSAL_LM.data, seed=0)
    first = made.train[0]
    assert isinstance(first, Conversation) and first.messages[1].calls[0].arguments == '{"a": "2024-05-01", "b": 1.10}'


def test_cells_of_a_table(tmp_path: Path) -> None:
    """32-bit numbers have the digits they were written with; text stored as bytes is text; a mapping is one."""
    table = pa.table(
        {
            "label": pa.array([0.1, 2.5], pa.float32()),
            "text": pa.array(["好".encode(), b"b"], pa.binary()),
            "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
            "kind": pa.array(["x", "y"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "d.parquet")
    assert [row.values for row in read_rows(str(tmp_path / "d.parquet"))] == [
        {"label": 0.1, "text": "好", "map": {"k": 1}, "kind": "x"},
        {"label": 2.5, "text": "b", "map": {}, "kind": "y"},
    ]
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="has the column 'text' twice"):
        read_rows(str(tmp_path / "twice.parquet"))


def test_a_folder_names_what_it_does_not_read(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    in_csv(tmp_path, rows).rename(tmp_path / "train.csv")
    in_jsonl(tmp_path, rows).rename(tmp_path / "more.jsonl")
    found = load_examples(DataConfig(train=str(tmp_path), test_size=0.0), SEQ_CLS.data, seed=0)
    assert list(found.train) == [Labelled("a", "x"), Labelled("b", "y")]
    assert found.notes == [f"{tmp_path}: not read, as their names say no part: more.jsonl"]


def test_a_readme_says_the_parts_and_the_classes(tmp_path: Path) -> None:
    write(
        tmp_path / "README.md",
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: first/*.csv\n"
        "  - split: test\n    path: second.csv\n"
        "dataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n    dtype:\n"
        "      class_label:\n"
        "        names:\n          '0': neg\n          '1': pos\n---\n",
    )
    (tmp_path / "first").mkdir()
    write(tmp_path / "first" / "a.csv", "text,label\n007,1\nNA,0\n")
    write(tmp_path / "second.csv", "text,label\nlast,1\n")
    found = load_examples(DataConfig(train=str(tmp_path)), SEQ_CLS.data, seed=0)
    assert list(found.train) == [Labelled("007", "pos"), Labelled("NA", "neg")]
    assert list(found.eval) == [Labelled("last", "pos")]


# ---- real data in every kind of file ----


def digest(path: Path, task: DataSpec) -> tuple[list[str], int]:
    config = DataConfig(train=str(path), test_size=0.0)
    found = load_examples(config, task, seed=0, keep_going=True)
    return list(found.train.lines()), len(found.skipped)


@pytest.mark.shared
@pytest.mark.parametrize("source", [s for s in SOURCES if s not in ("tsv", "folder of tsv")])
def test_reviews_in_chinese(source: str, shared: Path, tmp_path: Path) -> None:
    original = shared / "data" / "ChnSentiCorp_htl_all.csv"
    rows = [row.values for row in read_rows(str(original))][:1500]
    made = SOURCES[source](tmp_path, rows)
    lines, bad = digest(made, SEQ_CLS.data)
    assert lines == digest(original, SEQ_CLS.data)[0][: len(lines)]
    assert len(lines) + bad == 1500


@pytest.mark.shared
@pytest.mark.parametrize("source", ["jsonl", "parquet", "arrow", "saved", "hub of parquet", "folder of json"])
@pytest.mark.parametrize("name", ["alpaca_zh_demo.json", "glaive_toolcall_zh_demo.json", "alpaca_en_demo.json"])
def test_instructions_and_tool_calls(name: str, source: str, shared: Path, tmp_path: Path) -> None:
    original = shared / "data" / "instruct" / name
    rows: list[dict[str, Any]] = json.loads(original.read_text(encoding="utf-8"))
    assert digest(SOURCES[source](tmp_path, rows), CAUSAL_LM.data) == digest(original, CAUSAL_LM.data)


@pytest.mark.shared
@pytest.mark.parametrize("encoding", ["gb18030", "utf-8-sig", "utf-16"])
def test_encodings_of_real_text(encoding: str, shared: Path, tmp_path: Path) -> None:
    original = shared / "data" / "ChnSentiCorp_htl_all.csv"
    rows = [row.values for row in read_rows(str(original))]
    path = in_utf16(tmp_path, rows)
    path.write_bytes(separated(rows).encode(encoding))
    assert digest(path, SEQ_CLS.data) == digest(original, SEQ_CLS.data)


@pytest.mark.shared
def test_quotes_that_are_text(shared: Path) -> None:
    """SST-2's sentences have unpaired quotes, and no header line."""
    path = shared / "data" / "sst2" / "train.tsv"
    raw = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    rows = read_rows(str(path), header=["text", "label"])
    assert [list(row.values.values()) for row in rows] == raw
