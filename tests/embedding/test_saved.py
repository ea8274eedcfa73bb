"""sentence-transformers opens what siliang saves: an adapter, a merged model and a tuned one give the same vectors and
scores as `siliang predict`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from every_task import configured, make_models
from sentence_transformers import CrossEncoder, SentenceTransformer
from texts import rows
from tiny import write_jsonl
from transformers import AutoModel

from siliang.config import EmbeddingConfig, RunConfig
from siliang.run_folder import open_run
from siliang.tasks.embeddings.sentence_files import longest_text
from siliang.tasks.embeddings.tokens import encoded_with
from siliang.tasks.prepare import prepare_data
from siliang.train.run import train
from siliang.train.start_adapter import OUTPUTS, filled_in
from siliang.types import ConfigError
from siliang.use.merge import merge
from siliang.use.predict import predict

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*SWIG.*:DeprecationWarning"),
]
TEXTS = ["the film was good", "we liked it , not the actor", "a", "bright story " * 20]
PROMPTS = {"query_prompt": "we liked : ", "document_prompt": "the film : "}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


def trained(
    task: str, model: Path, models: dict[str, Path], folder: Path, method: str = "lora", **more: Any
) -> RunConfig:
    """A run of a few steps that change much."""
    config = configured(task, models, folder, method, learning_rate=2e-2, max_steps=4)
    config = RunConfig.build(config.model_dump(mode="json") | {"model": str(model)} | more)
    train(config)
    return config


def vectors(run: Path, texts: list[str]) -> np.ndarray:
    return np.array([found.values()["vector"] for found in predict(open_run(run), texts)])


@pytest.mark.parametrize(
    ("kind", "embedding"),
    [
        ("seq_cls", {}),
        ("seq_cls", {"pooling": "cls", "normalize": False} | PROMPTS),
        ("causal_lm", PROMPTS),
        ("causal_lm", {"pooling": "mean"}),
    ],
    ids=["mean", "cls", "last", "decoder-mean"],
)
def test_vectors(kind: str, embedding: dict[str, Any], models: dict[str, Path], tmp_path: Path) -> None:
    trained("embedding", models[kind], models, tmp_path, embedding=embedding)
    run = open_run(tmp_path / "run")
    expected = vectors(tmp_path / "run", TEXTS)
    merge(run, tmp_path / "merged")
    base = SentenceTransformer(str(models[kind]), device="cpu").encode(TEXTS)
    for folder in (tmp_path / "run" / "adapter", tmp_path / "merged"):
        opened = SentenceTransformer(str(folder), device="cpu")
        assert np.abs(opened.encode(TEXTS) - expected).max() < 1e-5, folder
        assert np.abs(opened.encode_document(TEXTS) - expected).max() < 1e-5
        assert base.shape == expected.shape and np.abs(base - expected).max() > 0.01  # the adapter counts
        query, document = opened.encode_query([TEXTS[0]]), opened.encode_document([TEXTS[1]])
        (pair,) = predict(run, [(TEXTS[0], TEXTS[1])])
        assert float(opened.similarity(query, document)) == pytest.approx(pair.values()["similarity"], abs=1e-5)
        assert opened.max_seq_length == 24


@pytest.mark.parametrize("case", ["classes", "pairs"])
def test_the_prompt_of_a_single_text(case: str, models: dict[str, Path], tmp_path: Path) -> None:
    """A text alone has the same prompt in training, in predictions and in sentence-transformers; others have names."""
    config = configured("embedding", models, tmp_path, "lora", learning_rate=2e-2, max_steps=4)
    data = {"train": str(write_jsonl(tmp_path / "own.jsonl", rows(case, 24))), "max_length": 24}
    alone = "query" if case == "classes" else "document"
    own = {"data": data, "embedding": PROMPTS | {"prompt_name": "query" if case == "classes" else "auto"}}
    config = RunConfig.build(config.model_dump(mode="json") | {"model": str(models["seq_cls"])} | own)
    train(config)
    opened = SentenceTransformer(str(tmp_path / "run" / "adapter"), device="cpu")
    run = open_run(tmp_path / "run")
    assert (
        opened.default_prompt_name == alone
        and np.abs(opened.encode(TEXTS) - vectors(tmp_path / "run", TEXTS)).max() < 1e-5
    )
    for name in ("query", "document"):
        found = np.array([p.values()["vector"] for p in predict(replace(run, prompt_name=name), TEXTS)])
        assert np.abs(opened.encode(TEXTS, prompt_name=name) - found).max() < 1e-5, name
        assert (np.abs(found - vectors(tmp_path / "run", TEXTS)).max() < 1e-6) == (name == alone)
    found = np.array([p.values()["vector"] for p in predict(replace(run, prompt_name="none"), TEXTS)])
    assert np.abs(opened.encode(TEXTS, prompt="") - found).max() < 1e-5
    with pytest.raises(
        ConfigError, match=r"--prompt-name \(prompt_name in Python\) = .passage.: must be query, document or none"
    ):
        list(predict(replace(run, prompt_name="passage"), TEXTS))
    if case == "classes":
        entry, legend = prepare_data(run.config).train[0], run.tokenizer
        assert legend.decode(entry["input_ids"], skip_special_tokens=True).startswith("we liked")


def test_a_prompt_of_another_task(models: dict[str, Path], tmp_path: Path) -> None:
    trained("reranker", models["seq_cls"], models, tmp_path)
    with pytest.raises(ConfigError, match=r"--prompt-name \(prompt_name in Python\) is for runs that give vectors"):
        list(predict(replace(open_run(tmp_path / "run"), prompt_name="query"), [(TEXTS[0], TEXTS[1])]))


def test_the_longest_text_fits_the_model(models: dict[str, Path]) -> None:
    """sentence-transformers cuts there, and would ask for a position that is not there."""
    model = AutoModel.from_pretrained(models["seq_cls"])
    positions = model.config.max_position_embeddings
    assert longest_text(positions + 1, model) == positions and longest_text(8, model) == 8
    assert longest_text(10_000, AutoModel.from_pretrained(models["causal_lm"])) == 10_000  # rotary


def test_a_model_that_was_tuned_whole(models: dict[str, Path], tmp_path: Path) -> None:
    trained("embedding", models["seq_cls"], models, tmp_path, "full")
    opened = SentenceTransformer(str(tmp_path / "run" / "model"), device="cpu")
    assert np.abs(opened.encode(TEXTS) - vectors(tmp_path / "run", TEXTS)).max() < 1e-5


def test_a_model_of_sentence_transformers(models: dict[str, Path], tmp_path: Path) -> None:
    """Its pooling and its prompts are kept."""
    own: Any = SentenceTransformer(str(models["seq_cls"]), device="cpu", prompts={"query": "we : ", "document": "a : "})
    own[1].pooling_mode = "cls"
    own.save_pretrained(str(tmp_path / "own"))
    trained("embedding", tmp_path / "own", models, tmp_path)
    opened = SentenceTransformer(str(tmp_path / "run" / "adapter"), device="cpu")
    assert opened.prompts == {"query": "we : ", "document": "a : "} and opened[1].pooling_mode == "cls"
    assert opened.default_prompt_name is None  # as that of the base
    assert np.abs(opened.encode(TEXTS) - vectors(tmp_path / "run", TEXTS)).max() < 1e-5


def test_a_tuned_model_whose_base_is_gone(models: dict[str, Path], tmp_path: Path) -> None:
    """It keeps the pooling and the prompts of its base model, which are in the run's record."""
    own: Any = SentenceTransformer(str(models["seq_cls"]), device="cpu", prompts={"query": "we : ", "document": "a : "})
    own[1].pooling_mode = "cls"
    own.save_pretrained(str(tmp_path / "own"))
    trained("embedding", tmp_path / "own", models, tmp_path, "full")
    expected = vectors(tmp_path / "run", TEXTS)
    (tmp_path / "own").rename(tmp_path / "elsewhere")
    assert np.array_equal(vectors(tmp_path / "run", TEXTS), expected)
    run = open_run(tmp_path / "run")
    assert run.config.embedding == EmbeddingConfig(
        pooling="cls", query_prompt="we : ", document_prompt="a : ", prompt_name="none"
    )


def test_what_was_not_recorded_is_not_guessed(models: dict[str, Path], tmp_path: Path) -> None:
    config = configured("embedding", models, tmp_path)
    with pytest.raises(ConfigError, match=r"embedding.pooling is left to the base model.*train the run again"):
        _ = prepare_data(config).train
    left = EmbeddingConfig(pooling="cls", query_prompt="", prompt_name="none")
    with pytest.raises(ConfigError, match=r"embedding.document_prompt is left"):
        _ = prepare_data(config.model_copy(update={"embedding": left})).train


def test_an_adapter_that_is_trained_further_keeps_its_vectors(models: dict[str, Path], tmp_path: Path) -> None:
    config = trained("embedding", models["seq_cls"], models, tmp_path, embedding={"pooling": "cls"} | PROMPTS)
    values: dict[str, object] = {"adapter": str(tmp_path / "run"), "data": {"train": config.data.train}}
    values |= {"output": "more"}
    more = RunConfig.build(filled_in(values | {"embedding": {"scale": 30.0}}))
    assert more.embedding is not None and more.embedding.pooling == "cls" and more.embedding.scale == 30.0
    assert more.embedding.query_prompt == PROMPTS["query_prompt"] and more.embedding.prompt_name == "document"


def test_what_an_adapter_was_trained_with_belongs_to_it() -> None:
    """All settings on which the tokens depend, but the number of negatives that a training reads."""
    assert set(json.loads(encoded_with(EmbeddingConfig()))) - {"ends", "negatives"} <= set(OUTPUTS["embedding"])


def test_a_record_without_a_name_of_the_prompt(models: dict[str, Path], tmp_path: Path) -> None:
    """It matters only where there are prompts."""
    config = configured("embedding", models, tmp_path)
    settings = EmbeddingConfig(pooling="cls", query_prompt="", document_prompt="")
    assert len(prepare_data(config.model_copy(update={"embedding": settings})).train)
    settings.query_prompt = "we : "
    with pytest.raises(ConfigError, match=r"embedding.prompt_name is left"):
        _ = prepare_data(config.model_copy(update={"embedding": settings})).train


@pytest.mark.parametrize("kind", ["seq_cls", "causal_lm"])
@pytest.mark.parametrize("loss", ["binary_cross_entropy", "mse"])
def test_scores(kind: str, loss: str, models: dict[str, Path], tmp_path: Path) -> None:
    trained("reranker", models[kind], models, tmp_path, reranker={"loss": loss})
    run = open_run(tmp_path / "run")
    pairs = [(TEXTS[0], text) for text in TEXTS[1:]]
    expected = np.array([found.values()["score"] for found in predict(run, pairs)])
    merge(run, tmp_path / "merged")
    for folder in (tmp_path / "run" / "adapter", tmp_path / "merged"):
        opened = CrossEncoder(str(folder), device="cpu")
        assert np.abs(opened.predict(pairs) - expected).max() < 1e-5, folder
