"""Embeddings and rerankers by the commands: check, train, resume, eval, predict, compare; and what does not fit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from every_task import make_models
from safetensors.torch import load_file
from texts import rows
from tiny import write_jsonl

from faults.commands import run as command
from siliang.check import gather_input
from siliang.config import EmbeddingConfig, RunConfig
from siliang.records import Record
from siliang.run_folder import open_run
from siliang.tasks.embedding import EMBEDDING, with_vectors
from siliang.types import ConfigError
from siliang.use.predict_file import predict_file

STEPS = ("batch_size=4", "gradient_accumulation=2", "save_every=3", "eval_every=3", "precision=fp32")
STEPS = (*STEPS, "log_every=1", "schedule=constant")
CASES = {
    "pairs": ("embedding", "ndcg_at_10"),
    "triplets": ("embedding", "ndcg_at_10"),
    "scored": ("embedding", "spearman"),
    "classes": ("embedding", "accuracy"),
    "reranked": ("reranker", "ndcg_at_10"),
    "graded": ("reranker", "spearman"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


def settings(case: str, models: dict[str, Path], folder: Path, *more: str, model: str = "seq_cls") -> list[str]:
    task, _ = CASES[case]
    data = write_jsonl(folder / f"{case}.jsonl", rows(case, 32))
    values = ("data.max_length=24", "data.test_size=0.5", *(f"train.{value}" for value in STEPS), *more)
    words = ["--model", str(models[model]), "--data", str(data), "--task", task]
    return [*words, *(word for value in values for word in ("--set", value))]


def done(*words: object) -> str:
    ended = command(*words)
    assert ended.code in (0, None), ended
    return ended.out


@pytest.mark.parametrize("case", CASES)
def test_every_command(case: str, models: dict[str, Path], tmp_path: Path) -> None:
    given, (task, quality) = settings(case, models, tmp_path), CASES[case]
    assert "->" in done("check", *given)
    done("train", *given, "--set", "train.max_steps=6", "--output", tmp_path / "whole")
    done("train", *given, "--set", "train.max_steps=3", "--output", tmp_path / "part")
    done("train", "--resume", tmp_path / "part", "--set", "train.max_steps=6")
    whole, part = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "part"))
    assert whole.keys() == part.keys() and all(torch.equal(whole[name], part[name]) for name in whole)
    final = Record.read(tmp_path / "whole").final
    assert final == Record.read(tmp_path / "part").final and quality in final
    measured = json.loads(done("eval", tmp_path / "part", "--json"))
    assert measured[quality] == pytest.approx(final[quality], abs=1e-9)
    pair = json.loads(done("predict", tmp_path / "part", "the film\twas good", "--json"))
    assert isinstance(pair["similarity" if task == "embedding" else "score"], float)
    opener = "SentenceTransformer" if task == "embedding" else "CrossEncoder"
    assert f"load it with sentence_transformers.{opener}('" in done(
        "merge", tmp_path / "part", "--output", tmp_path / "m"
    )


def as_messages(row: dict[str, Any]) -> dict[str, Any]:
    """A row of columns as ms-swift 4 writes it."""

    def turns(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    first, second = (row.get(a, row.get(b)) for a, b in (("sentence1", "query"), ("sentence2", "pos")))
    positives = [second] if isinstance(second, str) else second
    found: dict[str, Any] = {
        "messages": turns(str(first)),
        "positive_messages": [turns(text) for text in positives or []],
    }
    found |= {"negative_messages": [turns(text) for text in row["neg"]]} if "neg" in row else {}
    return found | ({"label": row["score"]} if "score" in row else {})


@pytest.mark.parametrize(
    ("case", "task"), [("reranked", "embedding"), ("scored", "embedding"), ("reranked", "reranker")]
)
def test_messages_are_learned_as_columns_are(case: str, task: str, models: dict[str, Path], tmp_path: Path) -> None:
    """The same bits, metrics and predictions."""
    plain = rows(case, 16)
    for name, own in (("columns", plain), ("messages", [as_messages(row) for row in plain])):
        data = write_jsonl(tmp_path / f"{name}.jsonl", own)
        words = ["--model", models["seq_cls"], "--data", data, "--task", task, "--output", tmp_path / name]
        values = ("data.max_length=24", "data.test_size=0.25", "train.max_steps=2", "train.batch_size=4")
        done("train", *words, *(word for value in values for word in ("--set", value)))
        if "score" not in plain[0]:
            done("predict", tmp_path / name, "--data", data, "--output", tmp_path / f"{name}-found.jsonl")
    runs = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("columns", "messages")]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert Record.read(tmp_path / "columns").final == Record.read(tmp_path / "messages").final
    if "score" not in plain[0]:
        found = [(tmp_path / f"{name}-found.jsonl").read_text().splitlines() for name in ("columns", "messages")]
        of = [[{k: v for k, v in json.loads(line).items() if k.startswith("predicted")} for line in f] for f in found]
        assert of[0] == of[1] and len(of[0]) == 16


def test_a_prompt_of_each_row_is_not_lost_without_a_word(models: dict[str, Path], tmp_path: Path) -> None:
    """FlagEmbedding's column `prompt`, also where it is the same in all rows."""
    data = write_jsonl(tmp_path / "rows.jsonl", [row | {"prompt": "find the film :"} for row in rows("reranked", 16)])
    for task, words in (
        ("embedding", "is embedding.query_prompt; where it differs"),
        ("reranker", "write it in front of"),
    ):
        said = done("check", "--model", models["seq_cls"], "--data", data, "--task", task)
        assert "SL036" in said and words in " ".join(said.split()), said


def test_a_comparison(models: dict[str, Path], tmp_path: Path) -> None:
    """Its table and page have the metric of the rows."""
    given = settings("scored", models, tmp_path, "train.max_steps=2")
    out = done("compare", *given, "--methods", "lora,bitfit", "--seeds", "1", "--output", tmp_path / "all")
    assert "Spearman" in out and "nDCG" not in out
    assert "Spearman" in (tmp_path / "all" / "report.html").read_text(encoding="utf-8")


SCORED = {"text": "sentence1", "text_pair": "sentence2", "score": "score"}


def test_files_of_texts(models: dict[str, Path], tmp_path: Path) -> None:
    done("train", *settings("pairs", models, tmp_path), "--set", "train.max_steps=1", "--output", tmp_path / "run")
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"id": i, "text": f"the film {'was good ' * i}"} for i in range(3)])
    done("predict", tmp_path / "run", "--data", texts, "--output", tmp_path / "vectors.parquet")
    table = pq.read_table(tmp_path / "vectors.parquet").to_pylist()
    assert [len(row["predicted_vector"]) for row in table] == [32] * 3 and "predicted_similarity" not in table[0]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"query": "the film", "document": "was good"}])
    done("predict", tmp_path / "run", "--data", pairs, "--output", tmp_path / "similar.jsonl")
    (row,) = map(json.loads, (tmp_path / "similar.jsonl").read_text().splitlines())
    assert -1.0 <= row["predicted_similarity"] <= 1.0 and "predicted_vector" not in row

    scored = write_jsonl(tmp_path / "scored.jsonl", [{"sentence1": "the film", "sentence2": "was good"}])
    record = open_run(tmp_path / "run").record
    of_scores = replace(open_run(tmp_path / "run"), record=record.model_copy(update={"columns": SCORED}))
    assert predict_file(of_scores, str(scored), tmp_path / "scored.csv.jsonl") == 1
    (other,) = map(json.loads, (tmp_path / "scored.csv.jsonl").read_text().splitlines())
    assert other["predicted_similarity"] == row["predicted_similarity"]
    for column in ("anchor", "query", "document"):  # a text alone in one of the columns of a pair
        alone = write_jsonl(
            tmp_path / "alone.jsonl", [{"id": i, column: f"the film {'was good ' * i}"} for i in range(3)]
        )
        more = ("--data", alone, "--output", tmp_path / f"{column}.parquet")
        done("predict", tmp_path / "run", *more)  # without prompts, there is none to name
        found = pq.read_table(tmp_path / f"{column}.parquet").to_pylist()
        assert [row["predicted_vector"] for row in found] == [row["predicted_vector"] for row in table]
    own = EmbeddingConfig(pooling="mean", query_prompt="we ", document_prompt="", prompt_name="document")
    prompted = replace(of_scores, config=of_scores.config.model_copy(update={"embedding": own}), record=record)
    with pytest.raises(ConfigError, match=r"of a pair.* say the prompt: --prompt-name query.* \(prompt_name in Python"):
        predict_file(prompted, str(alone), tmp_path / "none.jsonl")
    assert predict_file(replace(prompted, prompt_name="query"), str(alone), tmp_path / "named.jsonl") == 3
    blank = write_jsonl(tmp_path / "blank.jsonl", [{"text": "\u3000"}, {"text": "the film"}])
    done("predict", tmp_path / "run", "--data", blank, "--output", tmp_path / "blank-out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "blank-out.jsonl").read_text().splitlines()]
    assert [row.get("predicted_vector") is None for row in found] == [True, False]
    other = write_jsonl(tmp_path / "other.jsonl", [{"id": 1, "words": "the film"}])
    out = ("--output", tmp_path / "out.csv")
    ended = command("predict", tmp_path / "run", "--data", other, *out)
    assert ended.code == 2 and "'anchor' and 'positive', or 'text'; it has 'id', 'words'. Rename them" in ended.err
    ended = command("predict", tmp_path / "run", "--prompt-name", "query", "--data", pairs, *out)
    assert ended.code == 2 and "--prompt-name (prompt_name in Python) is for texts that stand alone" in ended.err
    ended = command("predict", tmp_path / "run", "the film", "--temperature", 1)
    assert ended.code == 2 and "does not generate text" in ended.err


# ---- what does not fit ----

REFUSED: dict[str, tuple[str, dict[str, Any], tuple[str, ...], str]] = {
    "plain text": (
        "embedding",
        {"text": "the film"},
        (),
        "it has 'text'.*anchor-positive .texts that belong together., text-label",
    ),
    "a class of a pair": (
        "embedding",
        {"premise": "the film", "hypothesis": "was good", "label": "neutral"},
        (),
        "has \"neutral\" in 'label', which is no number.*task=seq_cls",
    ),
    "a loss of scores": (
        "embedding",
        {"anchor": "the film", "positive": "was good"},
        ("embedding.loss=cosent",),
        "cosent learns from scored pairs .*use multiple_negatives, triplet",
    ),
    "a direction of scored pairs": (
        "embedding",
        {"sentence1": "the film", "sentence2": "was good", "score": 0.5},
        ("embedding.symmetric=true", "accept=[SL052]"),
        "embedding.symmetric has no effect with embedding.loss = cosent: leave it out",
    ),
    "negatives of scored pairs": (
        "reranker",
        {"sentence1": "the film", "sentence2": "was good", "score": 0.5},
        ("reranker.negatives=2", "accept=[SL052]"),
        "reranker.negatives has no effect on scored pairs",
    ),
    "no negative": (
        "embedding",
        {"anchor": "the film", "positive": "was good"},
        ("embedding.loss=triplet",),
        "has no negative, which embedding.loss = triplet needs",
    ),
    "an empty positive": ("embedding", {"query": "the film", "pos": [""]}, (), "has an empty text in 'pos'"),
    "no positive": ("embedding", {"query": "the film", "pos": []}, (), "has no text in 'pos'"),
    "both": (
        "embedding",
        {"query": "the film", "pos": ["good"], "neg": ["good"]},
        (),
        "has the same text as positive and as negative",
    ),
    "too large a score": (
        "reranker",
        {"query": "the film", "document": "was good", "score": 4.5},
        (),
        "score 4.5, and reranker.loss = binary_cross_entropy takes 0 to 1.*reranker.loss=mse",
    ),
    "dimensions": (
        "embedding",
        {"anchor": "the film", "positive": "was good"},
        ("embedding.matryoshka_dims=[64, 32]",),
        "matryoshka_dims has 64, and the vectors of .* have 32",
    ),
    "best": (
        "embedding",
        {"anchor": "the film", "positive": "was good"},
        ("train.best=spearman", "train.eval_every=1"),
        "train.best = 'spearman' is not measured",
    ),
    "a section of another task": ("seq_cls", {"text": "a", "label": "b"}, ("embedding.pooling=cls",), "leave it out"),
    "pairs for classes": ("seq_cls", {"anchor": "a", "positive": "b"}, (), "task=embedding"),
    "scores for classes": (
        "seq_cls",
        {"sentence1": "the film", "sentence2": "was good", "score": 0.5},
        (),
        "task=embedding",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_does_not_fit(case: str, models: dict[str, Path], tmp_path: Path) -> None:
    task, row, sets, message = REFUSED[case]
    data = write_jsonl(tmp_path / "rows.jsonl", [row] * 4)
    words = ["--model", str(models["seq_cls"]), "--data", data, "--task", task, "--output", tmp_path / "run"]
    ended = command("train", *words, *(word for value in sets for word in ("--set", value)))
    assert ended.code == 2 and len(ended.err.strip().splitlines()) <= 3, ended
    assert re.search(message, ended.err.replace("\n", " ")), ended.err
    assert not (tmp_path / "run").exists()


def test_an_encoder_decoder(models: dict[str, Path], tmp_path: Path) -> None:
    given = settings("pairs", models, tmp_path, model="seq_2_seq_lm")
    ended = command("train", *given, "--output", tmp_path / "run")
    assert ended.code == 2 and "has an encoder and a decoder" in ended.err


def test_settings_that_a_loss_does_not_take(tmp_path: Path) -> None:
    """Each is refused with its name, and taken by the losses that have it."""
    pairs, scored, classes = "anchor-positive", "scored-pair", "text-label"
    cases = [(scored, "symmetric", True), (scored, "margin", 1.0), (scored, "negatives", 2), (classes, "scale", 5.0)]
    for layout, name, value in [*cases, (pairs, "margin", 1.0), (classes, "negatives", 2)]:
        task = with_vectors(EMBEDDING, EmbeddingConfig.model_validate({name: value}))
        with pytest.raises(ConfigError, match=f"embedding.{name} has no effect with embedding.loss = "):
            task.on(layout)
    for layout, name, value in [(pairs, "symmetric", True), (pairs, "negatives", 2), (scored, "scale", 5.0)]:
        with_vectors(EMBEDDING, EmbeddingConfig.model_validate({name: value})).on(layout)
    data = {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows("pairs")))}
    values = {"model": str(tmp_path), "task": "embedding", "data": data, "output": str(tmp_path / "run")}
    checked = gather_input(RunConfig.build(values | {"embedding": {"margin": 1.0}}))
    with pytest.raises(ConfigError, match=r"embedding.margin has no effect"):
        _ = checked.examples
