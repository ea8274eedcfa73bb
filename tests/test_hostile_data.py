"""Data that unpacks, or says that it is, much larger than its file: what it asks for is bounded, and said in a line."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import read_rows
from tiny import write_jsonl

from siliang.data import arrow_rows, json_stream, text_files
from siliang.types import DataError

ROW = {"text": "the film", "label": "good"}


@pytest.fixture
def small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row may have 300,000 characters: the bounds show at small files."""
    for module in (text_files, json_stream, arrow_rows):
        monkeypatch.setattr(module, "MOST_ROW", 300_000)
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 100_000)


def write_arrow(path: Path, **columns: Any) -> Path:
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return path


def repeated(rows: int, text: str) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.tsv"])
def test_a_row_that_does_not_end(name: str, small_rows: None, tmp_path: Path) -> None:
    long = "the film " * 50_000
    begin = {".jsonl": '{"text": "', ".json": '[{"text": "'}.get(name[1:], "text\tlabel\n")
    (tmp_path / name).write_text(begin + long)
    with pytest.raises(DataError, match="300,000"):
        read_rows(str(tmp_path / name))


def test_lines_that_end_with_a_carriage_return_are_measured_too(small_rows: None, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the film\r" * 100_000, newline="")
    assert len(read_rows(str(tmp_path / "a.txt"))) == 100_000
    (tmp_path / "a.txt").write_text("the film " * 100_000 + "\r", newline="")
    with pytest.raises(DataError, match="900,000 characters"):
        read_rows(str(tmp_path / "a.txt"))


def test_a_list_in_one_line_is_read_item_by_item(small_rows: None, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([ROW] * 30_000))
    assert len(read_rows(str(tmp_path / "a.json"))) == 30_000


def test_an_object_that_is_too_large_to_be_read_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": [ROW] * 10}))
    assert len(read_rows(str(tmp_path / "a.json"))) == 10
    monkeypatch.setattr(json_stream, "MOST_WHOLE", 100)
    with pytest.raises(DataError, match="more than 100 characters"):
        read_rows(str(tmp_path / "a.json"))


def test_a_packed_file_that_grows_beyond_measure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as packed:
        packed.writelines(json.dumps(ROW) + "\n" for _ in range(100_000))
    assert len(read_rows(str(tmp_path / "a.jsonl.gz"))) == 100_000  # 300 times, and small all the same
    monkeypatch.setattr(text_files, "SMALL_BYTES", 2**20)
    with pytest.raises(DataError, match="unpacks to more than 200 times its size"):
        read_rows(str(tmp_path / "a.jsonl.gz"))


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow"])
def test_too_many_columns(kind: str, tmp_path: Path) -> None:
    path, names = tmp_path / f"a.{kind}", [f"c{i}" for i in range(10_001)]
    if kind == "csv":
        path.write_text(",".join(names) + "\n")
    elif kind == "parquet":
        pq.write_table(pa.table({name: ["a"] for name in names}), path)
    else:
        write_arrow(path, **{name: pa.array(["a"]) for name in names})
    with pytest.raises(DataError, match=r"10,001 columns: at most 10,000"):
        read_rows(str(path))


def test_the_reason_of_each_bad_row_is_short(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",".join(f"column-{i}" for i in range(9000)) + "\na,b\n")
    assert len(read_rows(str(tmp_path / "a.csv"))[0].problem or "") < 400


HUGE: dict[str, dict[str, Any]] = {
    "a list of nulls": {"x": pa.ListArray.from_arrays(pa.array([0, 2 * 10**9], pa.int32()), pa.nulls(2 * 10**9))},
    "nulls in a struct": {
        "x": pa.StructArray.from_arrays(
            [pa.ListArray.from_arrays(pa.array([0, 2 * 10**9], pa.int32()), pa.nulls(2 * 10**9))], ["y"]
        )
    },
    "run ends": {"x": pa.RunEndEncodedArray.from_arrays(pa.array([1], pa.int32()), pa.array(["a"]))},
    "views": {"x": pa.array(["a"], pa.string_view())},
}


@pytest.mark.parametrize("columns", HUGE.values(), ids=HUGE)
def test_arrow_values_that_a_small_file_names(columns: dict[str, Any], tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", text=pa.array(["the film"]), label=pa.array(["good"]), **columns)
    assert path.stat().st_size < 5000
    with pytest.raises(DataError, match=r"more than 1,000 times the characters|is not read"):
        read_rows(str(path))


def test_a_text_that_many_rows_name_is_read_row_by_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[int] = []
    rows = arrow_rows._rows

    def counted(batch: Any, *rest: Any) -> Any:
        made.append(batch.num_rows)
        return rows(batch, *rest)

    monkeypatch.setattr(arrow_rows, "_rows", counted)
    path = write_arrow(tmp_path / "a.arrow", text=repeated(8, "the film " * 200_000), label=pa.array(["good"] * 8))
    assert len(read_rows(str(path))) == 8
    assert made.count(2) == 4
    path = write_arrow(tmp_path / "a.arrow", text=repeated(2000, "the film " * 10_000))
    with pytest.raises(DataError, match=r"more than 1,000 times the characters of the file"):
        read_rows(str(path))
    path = write_arrow(tmp_path / "a.arrow", text=repeated(2, "the film " * 2_000_000))
    with pytest.raises(DataError, match=r"a row has 18,000,00. values and characters: at most 16,777,216"):
        read_rows(str(path))


def test_a_parquet_file_that_grows_beyond_measure(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["the film " * 2_000_000, "a"]}), path, compression="zstd")
    with pytest.raises(DataError, match="more than 50 times its size"):
        read_rows(str(path))


@pytest.mark.parametrize("places", [(0, 5, 2_000_000_000), (0, 2_000_000_000, 10), (0, -2_000_000_000, 10)])
def test_places_beyond_the_end_of_an_arrow_file(places: tuple[int, ...], tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", text=pa.array(["hello", "world"]), label=pa.array(["p", "n"]))
    content = path.read_bytes()
    assert content.count(struct.pack("<3i", 0, 5, 10)) == 1
    path.write_bytes(content.replace(struct.pack("<3i", 0, 5, 10), struct.pack("<3i", *places)))
    with pytest.raises(DataError, match=r"is damaged|is not a readable arrow file"):
        read_rows(str(path))


def test_descriptions_that_are_no_descriptions(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [ROW])
    with (tmp_path / "README.md").open("wb") as readme:
        readme.write(b"---\nconfigs:\n")
        readme.truncate(2**36)  # of which nothing is on the disk
    assert len(read_rows(str(tmp_path))) == 1
    with (tmp_path / "dataset_info.json").open("wb") as file:
        file.truncate(2**36)
    with pytest.raises(DataError, match=r"dataset_info.json has 68,719,476,736 bytes"):
        read_rows(str(tmp_path))
