"""Rows of texts that belong together, as published data have them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from every_task import make_models
from tiny import write_jsonl

from siliang.config import Columns, EmbeddingConfig, RunConfig
from siliang.data.cells import BadRow
from siliang.data.example import Example
from siliang.data.examples import Labelled, Related, Scored
from siliang.data.list_cells import CsvCell
from siliang.data.related import read_related
from siliang.tasks import settled
from siliang.tasks.embedding import EMBEDDING, with_vectors
from siliang.tasks.embeddings.tokens import texts_of
from siliang.tasks.prepare import prepare_data
from siliang.types import DataError


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text} for text in texts]


PASSAGES = {"is_selected": [0, 1, 0], "passage_text": ["a", "b", "c"]}
PUBLISHED: list[tuple[dict[str, Any], Example]] = [
    ({"anchor": "q", "positive": "a"}, Related("q", ("a",))),
    ({"anchor": "q", "positive": "a", "negative": "b"}, Related("q", ("a",), ("b",))),
    ({"query": "q", "positive": "a", "negative_1": "b", "negative_2": "c"}, Related("q", ("a",), ("b", "c"))),
    ({"query": "q", "pos": ["a", "b"], "neg": ["c"], "pos_scores": [1, 2]}, Related("q", ("a", "b"), ("c",))),
    (
        {"query": "q", "positive_passages": [{"title": "t", "text": "a"}], "negative_passages": [{"text": "b"}]},
        Related("q", ("t a",), ("b",)),
    ),
    ({"query": "q", "passages": PASSAGES}, Related("q", ("b",), ("a", "c"))),
    ({"question": "q", "answer": "a"}, Related("q", ("a",))),
    ({"sentence1": "q", "sentence2": "a", "score": 0.5}, Scored("q", "a", 0.5)),
    ({"sentence1": "q", "sentence2": "a", "label": "1"}, Scored("q", "a", 1.0)),
    ({"query": "q", "document": "a", "label": 0}, Scored("q", "a", 0.0)),  # a pair with a label is no positive
    ({"query": "q", "text": "a", "label": 1}, Scored("q", "a", 1.0)),
    ({"query": "q", "text": "a", "score": "0,5"}, Scored("q", "a", 0.5, "0,5")),
    ({"text": "q", "label": "c"}, Labelled("q", "c")),
    # ms-swift, up to version 3
    ({"query": "q", "response": "a", "rejected_response": ["b", "c"]}, Related("q", ("a",), ("b", "c"))),
    ({"query": "q", "response": "a", "label": 0.8}, Scored("q", "a", 0.8)),
    # and 4
    ({"messages": turns("q"), "positive_messages": [turns("a")]}, Related("q", ("a",))),
    (
        {
            "messages": turns("q"),
            "positive_messages": [[{"role": "assistant", "content": "a"}]],
            "negative_messages": [turns("b")] * 2,
        },
        Related("q", ("a",), ("b",)),
    ),
    ({"messages": turns("q"), "positive_messages": [turns("a")], "label": 0.5}, Scored("q", "a", 0.5)),
]


@pytest.mark.parametrize(("row", "expected"), PUBLISHED, ids=[" ".join(row) for row, _ in PUBLISHED])
def test_published_rows(row: dict[str, Any], expected: Example, tmp_path: Path) -> None:
    data = {"train": str(write_jsonl(tmp_path / "rows.jsonl", [row])), "test_size": 0.0}
    values = {"model": str(tmp_path), "task": "embedding", "data": data, "output": str(tmp_path / "run")}
    (found,) = prepare_data(RunConfig.build(values)).examples.train
    assert found == expected


CELLS = ['["a", "b"]', "['a', 'b']", "['a' 'b']", "['a'\n 'b']"]  # JSON, Python, NumPy


@pytest.mark.parametrize("cell", CELLS)
def test_lists_that_csv_holds_as_text(cell: str, tmp_path: Path) -> None:
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["query", "pos", "neg"], ["q", cell, "['c']"], ["q", "[1] a", "[]"], ["q", "[a]", ""]])
        writer.writerow(["q", str(PASSAGES), ""])
    data = {"train": str(tmp_path / "rows.csv"), "test_size": 0.0}
    values = {"model": str(tmp_path), "task": "embedding", "data": data, "output": str(tmp_path / "run")}
    found = list(prepare_data(RunConfig.build(values)).examples.train)
    assert found == [
        Related("q", ("a", "b"), ("c",)),
        Related("q", ("[1] a",)),
        Related("q", ("[a]",)),
        Related("q", ("b",), ("a", "c")),
    ]


def test_lists_are_those_of_csv_alone(tmp_path: Path) -> None:
    """In formats that have lists, such a text is a text."""
    row = {"query": "q", "pos": "['red', 'green']", "neg": "[]"}
    data = {"train": str(write_jsonl(tmp_path / "rows.jsonl", [row])), "test_size": 0.0}
    values = {"model": str(tmp_path), "task": "embedding", "data": data, "output": str(tmp_path / "run")}
    (found,) = prepare_data(RunConfig.build(values)).examples.train
    assert found == Related("q", ("['red', 'green']",), ("[]",))
    (tmp_path / "rows.csv").write_text("query,pos\nq,\"['a' 'b' ... 'c']\"\n")
    values["data"] = {"train": str(tmp_path / "rows.csv"), "test_size": 0.0}
    with pytest.raises(DataError, match="looks like a list in 'pos', and cannot be read as one"):
        _ = prepare_data(RunConfig.build(values)).examples.train


@pytest.mark.parametrize(
    ("cell", "broken"),
    [
        ("['quoted'] text ['here']", False),
        ("['a'], ['b']", False),
        ('["a"] or ["b]"]', False),
        ("{'is_selected'} and {b}", False),
        ("['a' ... 'b']", True),
        ("['a [1] b' ... 'c]']", True),
        ("['it's', 'b']", True),
        ("['a' ... 'b']\u3000\ufeff", True),
        ("{'is_selected': [0, 1], 'passage_text': ['a' ... 'b']}", True),
    ],
)
def test_what_was_written_as_a_list(cell: str, broken: bool) -> None:
    """A passage with quotes in brackets at both ends is a text, and no bad row."""
    values: dict[str, object] = {"anchor": "q", "positive": CsvCell(cell)}
    if broken:
        with pytest.raises(BadRow, match="looks like a list in 'positive'"):
            read_related(values, Columns())
    else:
        assert read_related(values, Columns()) == Related("q", (cell,), ())


UNFIT: list[tuple[dict[str, Any], str]] = [
    (
        {"messages": turns("q", "r"), "positive_messages": [turns("a")]},
        "has 2 turns in 'messages'.*embedding.query_prompt",
    ),
    ({"messages": turns("q"), "positive_messages": turns("a")}, "must hold lists of messages in 'positive_messages'"),
    ({"messages": turns("q"), "positive_messages": []}, "has no text in 'positive_messages'"),
    (
        {"messages": turns("q"), "positive_messages": [turns("a")] * 2, "label": 1},
        "has 2 texts .* and a score in 'label'",
    ),
    (
        {"messages": turns("q"), "positive_messages": [turns("a")], "negative_messages": [turns("b")], "label": 1},
        "has texts in 'negative_messages' and a score in 'label'",
    ),
    (
        {"query": "q", "response": "a", "rejected_response": ["b"], "label": 1},
        "has texts in 'rejected_response' and a score",
    ),
    (
        {"messages": turns("q"), "positive_messages": [turns("a")], "label": "x"},
        "has .x. in 'label', which is no number",
    ),
]


@pytest.mark.parametrize(("row", "message"), UNFIT, ids=[message for _, message in UNFIT])
@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_rows_that_do_not_fit(task: str, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = {"train": str(write_jsonl(tmp_path / "rows.jsonl", [row])), "test_size": 0.0}
    values = {"model": str(tmp_path), "task": task, "data": data, "output": str(tmp_path / "run")}
    with pytest.raises(DataError, match=message):
        _ = prepare_data(RunConfig.build(values)).examples.train


def test_messages_that_belong_together_are_no_conversation(tmp_path: Path) -> None:
    row = {"messages": [*turns("q"), {"role": "assistant", "content": "a"}], "positive_messages": [turns("a")]}
    data = {"train": str(write_jsonl(tmp_path / "rows.jsonl", [row])), "test_size": 0.0}
    values = {"model": str(tmp_path), "task": "causal_lm", "data": data, "output": str(tmp_path / "run")}
    with pytest.raises(DataError, match="from which task=embedding and task=reranker learn"):
        _ = prepare_data(RunConfig.build(values)).examples.train


def test_passages_of_which_none_is_selected(tmp_path: Path) -> None:
    row = {"query": "q", "passages": PASSAGES | {"is_selected": [0, 0, 0]}}
    data = {"train": str(write_jsonl(tmp_path / "rows.jsonl", [row]))}
    values = {"model": str(tmp_path), "task": "embedding", "data": data, "output": str(tmp_path / "run")}
    with pytest.raises(DataError, match="has no text in 'passages'"):
        _ = prepare_data(RunConfig.build(values)).examples.train


def test_each_positive_is_an_entry() -> None:
    example = Related("q", ("a", "b"), ("c", "d"))
    assert texts_of(example, EmbeddingConfig(negatives=1)) == [("q", "a", "c"), ("q", "b", "c")]


def test_other_prompts_give_other_tokens(tmp_path: Path) -> None:
    """Also where tokens are kept in files: prompts are part of what they are known by."""
    models = make_models(tmp_path / "models")
    rows = [{"anchor": f"the film {i}", "positive": "was good"} for i in range(2100)]
    data = {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "test_size": 0.0}
    values = {"model": str(models["seq_cls"]), "task": "embedding", "data": data, "output": str(tmp_path / "run")}
    plain, prompted = (
        prepare_data(settled(RunConfig.build(values | {"embedding": {"query_prompt": prompt}}))[0]).train[0]
        for prompt in ("", "we liked ")
    )
    assert prompted["sequences"][0] == plain["sequences"][0] + 2 and prompted["sequences"][1] == plain["sequences"][1]


def test_tokens_are_known_by_what_the_encoder_reads() -> None:
    """Another loss, scale or pooling does not encode the rows again; the end of each text does."""
    settings = EmbeddingConfig(pooling="mean", query_prompt="", document_prompt="", prompt_name="document")
    others = {"loss": "triplet", "scale": 3.0, "margin": 1.0, "pooling": "cls", "normalize": False}

    def known_by(**changes: Any) -> str:
        return with_vectors(EMBEDDING, settings.model_copy(update=changes)).data.encoded_with

    assert {known_by(**{name: value}) for name, value in others.items()} == {known_by()}
    new = {"pooling": "last", "negatives": 1, "query_prompt": "q", "document_prompt": "d", "prompt_name": "query"}
    assert len({known_by(), *(known_by(**{name: value}) for name, value in new.items())}) == 6
