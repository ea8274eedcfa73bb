"""The metrics of ranks: equal texts, equal scores, and the answers that they are made of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from siliang.config import EmbeddingConfig, RerankerConfig
from siliang.data.examples import Related
from siliang.tasks import embedding, reranker
from siliang.tasks.embeddings.tokens import texts_of
from siliang.tasks.task import EntryValues, Task


def evaluated(task: Task, examples: list[Related], labels: list[float], numbers: list[int]) -> Any:
    """The rows of an evaluation.

    Args:
        labels: Of each entry.
        numbers: Of each entry's example.
    """
    columns: dict[str, Any] = {"labels": torch.tensor(labels), "row": torch.tensor(numbers)}
    return SimpleNamespace(examples=examples, tokens=SimpleNamespace(column=columns.__getitem__))


def reranked(examples: list[Related], score: Any) -> tuple[dict[int, float], Any]:
    """The logits of all pairs, by a function of query and text, and the rows."""
    pairs = [(i, *pair) for i, e in enumerate(examples) for pair in reranker.pairs_of(e, RerankerConfig())]
    found = {entry: score(query, text) for entry, (_, query, text, _) in enumerate(pairs)}
    return found, evaluated(reranker.RERANKER, examples, [p[3] for p in pairs], [p[0] for p in pairs])


def measured(examples: list[Related], score: Any) -> dict[str, float]:
    task = reranker.RERANKER
    assert task.measure is not None
    return task.measure(*reranked(examples, score))


def vectors(examples: list[Related], vector: Any) -> tuple[dict[int, EntryValues], Any]:
    """The values of all entries, by a function of the text, and the rows."""
    texts = [(i, own) for i, e in enumerate(examples) for own in texts_of(e, EmbeddingConfig())]
    known = {text: n for n, text in enumerate(sorted({t for _, own in texts for t in own}, key=lambda t: t[::-1]))}

    def value(text: str) -> torch.Tensor:
        return torch.cat([torch.tensor([0.0, 0.0, float(known[text]), 0.0]), torch.tensor(vector(text))])

    found = {n: EntryValues(torch.stack([value(text) for text in own])) for n, (_, own) in enumerate(texts)}
    return found, evaluated(embedding.EMBEDDING, examples, [0.0] * len(texts), [i for i, _ in texts])


def many(n: int = 60) -> list[Related]:
    return [Related(f"q{i}", (f"{i} a",), tuple(f"{i} {j}" for j in range(29))) for i in range(n)]


def test_the_layout_of_the_file_does_not_count() -> None:
    """A row of two positives, and two rows of one with the same negatives, are the same candidates."""
    scores = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0}
    apart = [Related("q", ("a",), ("c", "d")), Related("q", ("b",), ("c", "d"))]
    together = [Related("q", ("a", "b"), ("c", "d"))]
    one, other = (measured(rows, lambda query, text: scores[text]) for rows in (apart, together))
    assert one == other
    assert one["mrr_at_10"] == 0.5 and one["recall_at_1"] == 0.0
    assert one["ndcg_at_10"] == pytest.approx((1 / 1.5849625 + 1 / 2.3219281) / (1 + 1 / 1.5849625))


def test_a_constant_score_is_no_ranking() -> None:
    by_reranker = measured(many(), lambda query, text: 1.5)
    task = embedding.with_vectors(embedding.EMBEDDING, EmbeddingConfig(pooling="mean"))
    assert task.measure is not None
    by_vectors = task.measure(*vectors(many(), lambda text: [1.0, 1.0, 0.0]))
    assert by_reranker["recall_at_1"] < 0.2 and by_reranker["recall_at_10"] < 0.6
    assert by_vectors["recall_at_10"] < 0.1


def test_large_logits_keep_their_order() -> None:
    """Their probabilities are all 1 in fp32."""
    rows = [Related(f"q{i}", (f"{i} a",), (f"{i} b",)) for i in range(8)]
    task = reranker.RERANKER
    nothing: Any = None
    assert task.read is not None and task.measure is not None
    for best, expected in (("a", 1.0), ("b", 0.0)):
        found, evaluation = reranked(rows, lambda query, text, best=best: 30.0 + text.endswith(best))
        output = SimpleNamespace(logits=torch.tensor([*found.values()])[:, None])
        kept = dict(zip(found, task.read(output, nothing, nothing), strict=True))
        assert task.measure(kept, evaluation)["recall_at_1"] == expected


def test_a_nearest_negative_is_the_answer() -> None:
    """The answers are those that the metrics count."""
    near = {"q": [1.0, 0.0], "p": [0.0, 1.0], "n": [0.9, 0.1], "r": [0.0, -1.0], "s": [0.1, -1.0]}
    rows = [Related("q", ("p",), ("n",)), Related("r", ("s",), ())]
    task = embedding.with_vectors(embedding.EMBEDDING, EmbeddingConfig(pooling="mean"))
    found, evaluation = vectors(rows, near.__getitem__)
    assert task.replies is not None and task.measure is not None
    replies = [reply for _, reply in task.replies(found, evaluation)]
    assert [(r.input, r.expected, r.predicted, r.correct) for r in replies] == [
        ("q", "p", "n", False),
        ("r", "s", "s", True),
    ]
    assert task.measure(found, evaluation)["recall_at_1"] == 0.5


def test_the_pairs_of_a_run_with_fewer_negatives() -> None:
    settings = RerankerConfig(negatives=1)
    rows = [Related("q", ("a", "b"), ("c", "d")), Related("r", ("e",), ("f", "g"))]
    pairs = [(i, *pair) for i, e in enumerate(rows) for pair in reranker.pairs_of(e, settings)]
    evaluation = evaluated(reranker.RERANKER, rows, [p[3] for p in pairs], [p[0] for p in pairs])
    task = reranker.with_loss(reranker.RERANKER, settings)
    assert task.replies is not None
    replies = list(task.replies(dict.fromkeys(range(len(pairs)), 0.0), evaluation))
    assert [(n, r.input) for n, r in replies] == [(i, f"{query}\n{text}") for i, query, text, _ in pairs]
