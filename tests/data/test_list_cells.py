"""Lists that csv holds as text are those of the rows, as datasets and pandas write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from siliang.config import DataConfig
from siliang.data.list_cells import held_in_text
from siliang.data.load import load_examples
from siliang.data.messages import Conversation
from siliang.tasks import CAUSAL_LM, EMBEDDING, PREFERENCE, QUESTION_ANS, TOKEN_CLS
from siliang.types import DataError

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), min_size=1, max_size=8)


@given(TEXTS)
def test_any_texts(texts: list[str]) -> None:
    assert held_in_text(json.dumps(texts)) == held_in_text(str(texts)) == texts
    assert held_in_text(str(np.array(texts, dtype=object))) == texts


@given(TEXTS)
def test_any_arrays_in_objects(texts: list[str]) -> None:
    held = {"text": np.array(texts, dtype=object), "answer_start": np.array([*range(len(texts))], np.int32)}
    assert held_in_text(str(held)) == {"text": texts, "answer_start": [*range(len(texts))]}


def test_arrays_that_numpy_shortened() -> None:
    assert held_in_text(str({"a": np.arange(2000)})) is None
    assert held_in_text(str([*map(str, range(3))])[:-1] + ", ...]") is None


@given(st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=8))
def test_any_numbers(numbers: list[int]) -> None:
    assert held_in_text(str(numbers)) == held_in_text(str(np.array(numbers))) == numbers
    halves = np.array(numbers) / 2
    assert held_in_text(str(halves.tolist())) == held_in_text(str([*halves])) == halves.tolist()
    assert held_in_text(str(halves)) == pytest.approx(halves.tolist(), rel=1e-6)  # NumPy writes eight digits


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(st.characters(exclude_categories=["Cs", "Cc"])),
    lambda held: st.lists(held, min_size=1, max_size=4) | st.dictionaries(st.sampled_from("abcd"), held, min_size=1),
    max_leaves=12,
)


def _of_numpy(value: Any) -> Any:
    """The value as datasets and pandas hold it: lists are arrays."""
    if isinstance(value, dict):
        return {key: _of_numpy(held) for key, held in value.items()}
    if not isinstance(value, list):
        return value
    array = np.empty(len(value), object)
    array[:] = [_of_numpy(held) for held in value]
    return array


@given(st.lists(VALUES, min_size=1, max_size=4))
def test_any_values(values: list[Any]) -> None:
    assert held_in_text(json.dumps(values)) == held_in_text(str(values)) == values
    assert held_in_text(str(_of_numpy(values))) == held_in_text(str([*_of_numpy(values)])) == values


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "[1] a",
        "[a]",
        "[a, b]",
        "[",
        "[1, 2",
        "{a}",
        "[-1 - 2]",
        "[2-1]",
        "[x for x in y]",
        "[array(1, 2)]",
        "[f([1])]",
    ],
)
def test_other_texts(text: str) -> None:
    assert held_in_text(text) is None


TAGGED = [{"tokens": ["it's", 'a "film"', "Bob"], "tags": ["O", "O", "B-PER"]}, {"tokens": ["one"], "tags": ["O"]}]
ANSWERED = [
    {"question": "who?", "context": "It's Bob's film", "answers": {"text": ["Bob's"], "answer_start": [5]}},
    {"question": "what?", "context": "It's Bob's film", "answers": {"text": ["film"], "answer_start": [11]}},
]


@pytest.mark.parametrize("writer", ["datasets", "pandas"])
def test_tags_and_answers_in_csv(writer: str, tmp_path: Path) -> None:
    rows: list[tuple[Any, list[dict[str, Any]]]] = [(TOKEN_CLS, TAGGED), (QUESTION_ANS, ANSWERED)]
    for task, own in rows:
        plain = tmp_path / "rows.jsonl"
        plain.write_text("\n".join(map(json.dumps, own)))
        path = tmp_path / "rows.csv"
        if writer == "pandas":
            pd.DataFrame(own).to_csv(path, index=False)
        else:  # of objects datasets writes NumPy's arrays by their names
            Dataset.from_list(own).to_csv(str(path))
        found, expected = (
            load_examples(DataConfig(train=str(p), test_size=0.0), task.data, seed=0).train for p in (path, plain)
        )
        assert list(found) == list(expected)


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


MADE_OF_TURNS: list[tuple[Any, list[dict[str, Any]]]] = [
    (CAUSAL_LM, [{"prompt": turns(f"it's {i}"), "completion": turns("", "a 'b'")[1:]} for i in range(2)]),
    (CAUSAL_LM, [{"prompt": turns(f"it's {i}", "a", "b"), "completion": turns("", "c")[1:]} for i in range(2)]),
    (CAUSAL_LM, [{"messages": turns(f"it's {i}", 'a "b"', "c", "d")} for i in range(2)]),
    (CAUSAL_LM, [{"instruction": f"{i}", "output": "a", "history": [["it's", "b"], ["c", "d"]]} for i in range(2)]),
    (PREFERENCE, [{"prompt": "p", "chosen": turns("p", f"it's {i}"), "rejected": turns("p", "b")} for i in range(2)]),
    (PREFERENCE, [{"prompt": "p", "responses": ["a", f"{i}b", "c"], "scores": [0.5, -1.5, -2.0]} for i in range(2)]),
    (
        EMBEDDING,
        [
            {
                "query": f"it's {i}",
                "positive_passages": [{"title": "t", "text": f"a {i}"}, {"title": "u", "text": f"b {i}"}],
                "negative_passages": [{"title": "v", "text": f"c {i}"}, {"title": "w", "text": f"d {i}"}],
            }
            for i in range(2)
        ],
    ),
]


@pytest.mark.parametrize("writer", ["datasets", "pandas", "pandas of parquet", "json"])
@pytest.mark.parametrize("number", range(len(MADE_OF_TURNS)))
def test_turns_and_passages_in_csv(number: int, writer: str, tmp_path: Path) -> None:
    task, own = MADE_OF_TURNS[number]
    plain, path = tmp_path / "rows.jsonl", tmp_path / "rows.csv"
    plain.write_text("\n".join(map(json.dumps, own)))
    if writer == "datasets":
        Dataset.from_list(own).to_csv(str(path))
    elif writer == "pandas":
        pd.DataFrame(own).to_csv(path, index=False)
    elif writer == "json":
        pd.DataFrame([{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in own]).to_csv(
            path, index=False
        )
    else:
        Dataset.from_list(own).to_parquet(str(tmp_path / "rows.parquet"))
        pd.read_parquet(tmp_path / "rows.parquet").to_csv(path, index=False)
    found, expected = (
        load_examples(DataConfig(train=str(p), test_size=0.0), task.data, seed=0).train for p in (path, plain)
    )
    assert list(found) == list(expected)


def test_turns_that_cannot_be_read(tmp_path: Path) -> None:
    """They would be learned with their brackets."""
    path = tmp_path / "rows.csv"
    pd.DataFrame({"prompt": ["p"], "completion": ["[{'content': 'a, 'role': 'assistant'}]"]}).to_csv(path, index=False)
    with pytest.raises(DataError, match="looks like turns in 'completion', and cannot be read as a list"):
        load_examples(DataConfig(train=str(path), test_size=0.0), CAUSAL_LM.data, seed=0)


@pytest.mark.parametrize(
    "text", ['["a\nb", "c]', "['a\nb', 'c']", "[['q\n1', 'a']]", "[it's]", "['a', \"b]", "[`a`]", "[$1, 2]", "[a?]"]
)
def test_quotes_that_are_not_closed(text: str) -> None:
    """Python's own tokens of such a text would make another one of it."""
    assert held_in_text(text) is None


@pytest.mark.parametrize("text", ['["\\ud83d"]', '["a\n\\ud83d"]', "['\\ud83d']", "[{(1, 2): 'a'}]"])
def test_half_of_a_character(text: str) -> None:
    assert held_in_text(text) is None


def test_line_breaks_in_json() -> None:
    assert held_in_text('["it is\ntwo lines", "b"]') == ["it is\ntwo lines", "b"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
@pytest.mark.parametrize(
    "answer",
    [
        [{"from": "Beijing", "to": "Shanghai"}],
        [{"role": "admin", "name": "Ann"}],
        [{"role": "user", "name": "Ann"}],
        [{"from": "user", "content": 1}, {"a": 2}],
    ],
)
def test_objects_that_are_no_turns(answer: object, name: str, tmp_path: Path) -> None:
    path, text = tmp_path / name, json.dumps(answer)
    frame = pd.DataFrame({"instruction": ["p"], "output": [text]})
    frame.to_csv(path, index=False) if name == "rows.csv" else frame.to_json(path, orient="records", lines=True)
    (found,) = load_examples(DataConfig(train=str(path), test_size=0.0), CAUSAL_LM.data, seed=0).train
    assert isinstance(found, Conversation) and found.messages[-1].content == text


def test_turns_as_json_in_a_text_of_jsonl_are_a_text(tmp_path: Path) -> None:
    """Only csv has no lists."""
    text = json.dumps(turns("a", "b"))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "p", "output": text}))
    (found,) = load_examples(DataConfig(train=str(path), test_size=0.0), CAUSAL_LM.data, seed=0).train
    assert isinstance(found, Conversation) and found.messages[-1].content == text


def test_a_list_of_objects_is_an_answer(tmp_path: Path) -> None:
    """Calls of functions are what many models learn to write."""
    path, calls = tmp_path / "rows.csv", '[{"name": "weather", "arguments": {}}]'
    pd.DataFrame({"prompt": ["p"], "completion": [calls]}).to_csv(path, index=False)
    (found,) = load_examples(DataConfig(train=str(path), test_size=0.0), CAUSAL_LM.data, seed=0).train
    assert isinstance(found, Conversation) and found.messages[-1].content == calls
