"""The losses of vectors beside those of sentence-transformers, on the same vectors, and the gradient of a large step of
small batches."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer import losses as peers
from tiny import ENCODER, VOCABULARY
from torch import Tensor
from transformers import BertConfig, BertModel

from siliang.config import EmbeddingConfig
from siliang.data.collate import PadCollator
from siliang.engine.batches import StepCollator
from siliang.engine.step import Engine
from siliang.tasks.embedding import EMBEDDING, LEARNS_FROM, TAKES, with_vectors
from siliang.tasks.embeddings.losses import LOSSES, Entries, of_dimensions

N, D = 24, 16


def vectors(columns: int) -> list[Tensor]:
    """Of each column, (N, D), with gradients."""
    g = torch.Generator().manual_seed(columns)
    return [torch.randn(N, D, generator=g).requires_grad_() for _ in range(columns)]


def entries(columns: Sequence[Tensor], labels: Tensor | None = None) -> Entries:
    keys = torch.arange(N * len(columns), dtype=torch.float32).view(N, len(columns))
    labels = torch.zeros(N) if labels is None else labels
    return Entries(
        list(torch.stack(list(columns), 1)),
        [torch.stack([own, torch.zeros_like(own)], -1) for own in keys],
        torch.stack([labels.float(), torch.zeros(N)], -1),
    )


def peer(kind: str, **settings: object) -> Any:
    model: Any = SimpleNamespace(get_embedding_dimension=lambda: D)
    made = getattr(peers, kind).__new__(getattr(peers, kind))
    torch.nn.Module.__init__(made)
    getattr(peers, kind).__init__(made, model=model, **settings)
    return made


def assert_same(loss: str, columns: list[Tensor], expected: Tensor, labels: Tensor | None = None, **more: Any) -> None:
    """The mean loss and its gradients are the expected ones."""
    settings = EmbeddingConfig(loss=loss, **more)  # type: ignore[arg-type]
    theirs = torch.autograd.grad(expected, columns)
    found = of_dimensions(entries(columns, labels), LOSSES[loss], settings) / N
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
    for ours, other in zip(torch.autograd.grad(found, columns), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)


SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


@pytest.mark.parametrize("columns", [2, 3, 5])
@pytest.mark.parametrize("symmetric", [False, True])
def test_multiple_negatives(columns: int, symmetric: bool) -> None:
    given = vectors(columns)
    theirs = peer("MultipleNegativesRankingLoss", scale=30.0, **(SYMMETRIC if symmetric else {}))
    expected = theirs.compute_loss_from_embeddings(given, torch.zeros(N))
    assert_same("multiple_negatives", given, expected, scale=30.0, symmetric=symmetric)


@pytest.mark.parametrize(("loss", "kind"), [("cosent", "CoSENTLoss"), ("cosine", "CosineSimilarityLoss")])
def test_scored_pairs(loss: str, kind: str) -> None:
    given = vectors(2)
    scores = torch.arange(N).remainder(5) / 4  # equal ones among them
    assert_same(loss, given, peer(kind).compute_loss_from_embeddings(given, scores), scores)


def test_triplets() -> None:
    given = vectors(3)
    expected = peer("TripletLoss", triplet_margin=1.0).compute_loss_from_embeddings(given, torch.zeros(N))
    assert_same("triplet", given, expected, margin=1.0)


@pytest.mark.parametrize("kind", ["BatchHardTripletLoss", "BatchSemiHardTripletLoss"])
def test_texts_with_classes(kind: str) -> None:
    given, classes = vectors(1), torch.arange(N).remainder(5) + 7
    expected = peer(kind, margin=2.0).compute_loss_from_embeddings(given, classes)
    name = "batch_hard_triplet" if "SemiHard" not in kind else "batch_semi_hard_triplet"
    assert_same(name, given, expected, classes, margin=2.0)


def test_matryoshka() -> None:
    given, dims, weights = vectors(2), [16, 8, 3], [1.0, 0.5, 2.0]
    theirs = peer("MultipleNegativesRankingLoss")
    parts = [
        w * theirs.compute_loss_from_embeddings([F.normalize(v[:, :d], dim=-1) for v in given], torch.zeros(N))
        for d, w in zip(dims, weights, strict=True)
    ]
    more = {"matryoshka_dims": dims, "matryoshka_weights": weights}
    assert_same("multiple_negatives", given, torch.stack(parts).sum(), **more)


def test_equal_texts_are_no_negatives() -> None:
    """Of a positive that two anchors have, and of two positives of one anchor, each is left out of the other's sum."""
    anchors, positives = vectors(2)
    whole = entries([anchors, positives])
    for first, second, column in ((0, 1, 1), (2, 3, 0)):  # equal positives, equal anchors
        whole.keys[second][column] = whole.keys[first][column]
    found = LOSSES["multiple_negatives"](whole, EmbeddingConfig(symmetric=True))
    scores = 20 * F.normalize(anchors, dim=-1) @ F.normalize(positives, dim=-1).T
    for i, j in ((0, 1), (1, 0), (2, 3), (3, 2)):
        scores = scores.index_put((torch.tensor(i), torch.tensor(j)), torch.tensor(-torch.inf))
    right = torch.arange(N)
    both = F.cross_entropy(scores, right, reduction="sum") + F.cross_entropy(scores.T, right, reduction="sum")
    torch.testing.assert_close(found, both / 2)


def test_a_positive_of_an_equal_anchor_is_no_negative_anywhere() -> None:
    """Entries 0 and 1 have one anchor. The positive of 1 is also that of 2 and a negative of 3, and of 0 itself."""
    anchors, positives, negatives = vectors(3)
    whole = entries([anchors, positives, negatives])
    whole.keys[1][0] = whole.keys[0][0]
    for i, column in ((2, 1), (3, 2), (0, 2)):
        whole.keys[i][column] = whole.keys[1][1]
    found = LOSSES["multiple_negatives"](whole, EmbeddingConfig(symmetric=True, scale=2.0))
    texts = F.normalize(torch.cat([positives, negatives]), dim=-1)
    wrong = torch.zeros(N, 2 * N, dtype=torch.bool)
    same = [1, 2, N + 3, N]  # the columns of that text
    wrong[0, same] = wrong[1, [0, *same]] = wrong[2, same] = True
    wrong[:, :N].fill_diagonal_(False)
    scores = (2 * F.normalize(anchors, dim=-1) @ texts.T).masked_fill(wrong, -torch.inf)
    right = torch.arange(N)
    both = F.cross_entropy(scores, right, reduction="sum") + F.cross_entropy(scores[:, :N].T, right, reduction="sum")
    torch.testing.assert_close(found, both / 2)


def test_the_settings_of_every_loss_are_known() -> None:
    assert TAKES.keys() == LEARNS_FROM.keys() == LOSSES.keys()


def test_negatives_of_unlike_number() -> None:
    """A row may have fewer negatives than another; each is one of the step."""
    anchors, positives, first, second = vectors(4)
    full = entries([anchors, positives, first, second])
    some = Entries(
        [v[: 2 + i % 3] for i, v in enumerate(full.vectors)],
        [k[: 2 + i % 3] for i, k in enumerate(full.keys)],
        full.labels,
    )
    texts = torch.cat([positives, first[[i for i in range(N) if i % 3]], second[[i for i in range(N) if i % 3 == 2]]])
    scores = 20 * F.normalize(anchors, dim=-1) @ F.normalize(texts, dim=-1).T
    expected = F.cross_entropy(scores, torch.arange(N), reduction="sum")
    torch.testing.assert_close(LOSSES["multiple_negatives"](some, EmbeddingConfig()), expected)


@pytest.mark.parametrize("loss", ["auto", "batch_semi_hard_triplet"])
def test_a_step_of_1024_rows_in_batches_of_32(loss: str) -> None:
    """The gradients are those of one batch of 1,024 rows."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**ENCODER, "num_hidden_layers": 1}
    model = BertModel(BertConfig(**sizes), add_pooling_layer=False).eval()
    g = torch.Generator().manual_seed(1)
    single = loss != "auto"
    rows = []
    for i in range(1024):
        lengths = [3 + (i + j) % 5 for j in range(1 if single else 2)]
        ids = torch.randint(5, VOCABULARY, (sum(lengths),), generator=g).tolist()
        label = float(i % 300) if single else 0.0
        rows.append({"input_ids": ids, "sequences": lengths, "labels": label, "labels_low": 0.0, "entry": i})
    task = with_vectors(EMBEDDING, EmbeddingConfig(pooling="mean", loss=loss))  # type: ignore[arg-type]
    found = {}
    for size in (1024, 32):
        engine = Engine(model, task)
        collator = StepCollator(PadCollator(0), task, size, packed=engine.padding is not None)
        batches = collator([dict(row) for row in rows])["batches"]
        assert len(batches) == 1024 // size
        mean = engine.run(model, batches, 1024.0)
        engine.close()
        found[size] = (mean, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    torch.testing.assert_close(found[32][0], found[1024][0], rtol=1e-5, atol=1e-6)
    assert found[32][1].keys() == found[1024][1].keys() and len(found[32][1]) > 10
    for name, gradient in found[1024][1].items():
        torch.testing.assert_close(
            found[32][1][name], gradient, rtol=1e-3, atol=1e-6 * float(gradient.abs().max() + 1), msg=name
        )
