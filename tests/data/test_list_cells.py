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
from siliang.tasks import QUESTION_ANS, TOKEN_CLS

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


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=8))
def test_any_numbers(numbers: list[int]) -> None:
    assert held_in_text(str(numbers)) == held_in_text(str(np.array(numbers))) == numbers


@pytest.mark.parametrize(
    "text",
    ["", "a", "[1] a", "[a]", "[a, b]", "[", "[1, 2", "{a}", "[-1 -2]", "[x for x in y]", "[array(1, 2)]", "[f([1])]"],
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
