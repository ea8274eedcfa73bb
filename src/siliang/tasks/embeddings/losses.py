"""The losses of vectors, each a row of `LOSSES`: a sum over the entries of a step, whose mean is that of
sentence-transformers.

Legend: N entries; D dimensions; A, P: the vectors of the anchors and of their positives, (N, D); K: their keys, (N, 2):
two texts are equal where their keys are; y: the scores, (N,), or the classes, (N, 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from siliang.config import EmbeddingConfig

KEY = 2  # numbers of a key or a class, each of 24 bits: fp32 holds them exactly
EXTRAS = 2 * KEY  # columns in front of a vector: the label or class, the key


@dataclass(frozen=True)
class Entries:
    """The entries of a step.

    Attributes:
        vectors: Of each entry, (its sequences, D): the anchor, its positive, its negatives; or the two texts of a pair;
            or a single text.
        keys: Likewise, (its sequences, KEY).
        labels: (N, KEY): the score, in the first column, or the class.
    """

    vectors: Sequence[Tensor]
    keys: Sequence[Tensor]
    labels: Tensor

    @classmethod
    def of(cls, values: Sequence[Tensor]) -> Entries:
        """
        Args:
            values: Of each entry, (its sequences, EXTRAS + D).
        """
        return cls(
            [v[:, EXTRAS:] for v in values],
            [v[:, KEY:EXTRAS].detach() for v in values],
            torch.stack([v[0, :KEY].detach() for v in values]),
        )

    def __len__(self) -> int:
        return len(self.vectors)

    def first(self, dims: int) -> Entries:
        """The same with the first dimensions alone, of length 1."""
        return replace(self, vectors=[F.normalize(v[:, :dims], dim=-1) for v in self.vectors])

    def column(self, i: int) -> Tensor:
        """The vector of sequence `i` of each entry, (N, D)."""
        return torch.stack([v[i] for v in self.vectors])

    @property
    def scores(self) -> Tensor:
        return self.labels[:, 0]


def multiple_negatives(entries: Entries, s: EmbeddingConfig) -> Tensor:
    """-log softmax over all positives and negatives of the step of scale cos(a, p), at the anchor's own positive.

    Henderson et al. 2017, arXiv 1705.00652; with s.symmetric the mean of both directions, as Radford et al. 2021, arXiv
    2103.00020. Each positive of an equal anchor is no negative, wherever its text is in the step: wrong[i, t] where
    text t equals the positive of an entry whose anchor equals anchor i.
    """
    A, P = F.normalize(entries.column(0), dim=-1), F.normalize(entries.column(1), dim=-1)
    others = torch.cat([v[2:] for v in entries.vectors])
    texts = torch.cat([P, F.normalize(others, dim=-1)])
    K_anchor, K_positive = (torch.stack([k[i] for k in entries.keys]) for i in (0, 1))
    K_text = torch.cat([K_positive, *(k[2:] for k in entries.keys)])
    same_anchor, same_positive = _equal(K_anchor, K_anchor).float(), _equal(K_positive, K_text).float()
    wrong = same_anchor @ same_positive > 0  # (N, all texts)
    wrong[:, : len(A)].fill_diagonal_(False)
    found = _cross_entropy(s.scale * A @ texts.T, wrong)
    if not s.symmetric:
        return found
    return (found + _cross_entropy(s.scale * P @ A.T, wrong[:, : len(A)].T)) / 2


def cosent(entries: Entries, s: EmbeddingConfig) -> Tensor:
    """log(1 + sum exp(scale (cos_j - cos_i))) over the pairs of entries whose scores are y_i > y_j.

    Su 2022 (CoSENT), Huang et al. 2024, doi 10.1109/TASLP.2024.3402087.
    """
    cosines = s.scale * F.cosine_similarity(entries.column(0), entries.column(1))
    y = entries.scores
    differences = (cosines[None] - cosines[:, None]).masked_fill(y[:, None] <= y[None], -torch.inf).flatten()
    return len(entries) * torch.cat([differences.new_zeros(1), differences]).logsumexp(0)


def cosine(entries: Entries, s: EmbeddingConfig) -> Tensor:
    """(cos - y)^2."""
    return (F.cosine_similarity(entries.column(0), entries.column(1)) - entries.scores).square().sum()


def triplet(entries: Entries, s: EmbeddingConfig) -> Tensor:
    """max(0, |a - p| - |a - n| + margin), the mean over an anchor's negatives.

    Schroff et al. 2015, arXiv 1503.03832.
    """
    losses: list[Tensor] = []
    for v in entries.vectors:
        near, far = F.pairwise_distance(v[:1], v[1:2]), F.pairwise_distance(v[:1].expand_as(v[2:]), v[2:])
        losses.append(F.relu(near - far + s.margin).mean())
    return torch.stack(losses).sum()


def batch_hard_triplet(entries: Entries, s: EmbeddingConfig) -> Tensor:
    """max(0, |a - p| - |a - n| + margin), p the farthest text of the anchor's class, n the nearest of another one.

    Hermans et al. 2017, arXiv 1703.07737.
    """
    distances, same = _distances(entries)
    own = torch.eye(len(entries), dtype=torch.bool, device=same.device)
    farthest = distances.masked_fill(~same | own, 0.0).amax(1)
    nearest = (distances + distances.amax(1, keepdim=True) * same).amin(1)
    return F.relu(farthest - nearest + s.margin).sum()


def batch_semi_hard_triplet(entries: Entries, s: EmbeddingConfig) -> Tensor:
    """max(0, |a - p| - |a - n| + margin), the mean over all pairs of a class; n is the nearest text of another class
    that is farther than p, or, if there is none, the farthest one.

    Schroff et al. 2015, arXiv 1503.03832.
    """
    distances, same = _distances(entries)
    own = torch.eye(len(entries), dtype=torch.bool, device=same.device)
    others = distances.masked_fill(same, torch.inf).sort(dim=1, stable=True).values
    place = torch.searchsorted(others.detach(), distances.detach().contiguous(), right=True)
    outside = others.gather(1, place.clamp(max=len(entries) - 1))
    least = distances.amin(1, keepdim=True)
    inside = ((distances - least) * ~same).amax(1, keepdim=True) + least
    negatives = torch.where(torch.isfinite(outside), outside, inside)
    pairs = (same & ~own).float()
    losses = F.relu((distances - negatives + s.margin) * pairs)
    return len(entries) * losses.sum() / pairs.sum().clamp(min=1.0)


def _cross_entropy(scores: Tensor, wrong: Tensor) -> Tensor:
    """The sum over the rows, the right column of row i being i.

    Args:
        wrong: The columns that are no negatives of a row.
    """
    right = torch.arange(len(scores), device=scores.device)
    return F.cross_entropy(scores.masked_fill(wrong, -torch.inf), right, reduction="sum")


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """Whether key i of a (N, KEY) is key j of b (M, KEY)."""
    return (a[:, None] == b[None]).all(-1)


def _distances(entries: Entries) -> tuple[Tensor, Tensor]:
    """The distance of each two texts, (N, N), and whether they are of one class."""
    vectors = entries.column(0)
    distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    return distances, _equal(entries.labels, entries.labels)


Loss = Callable[[Entries, EmbeddingConfig], Tensor]
LOSSES: dict[str, Loss] = {
    "multiple_negatives": multiple_negatives,
    "cosent": cosent,
    "cosine": cosine,
    "triplet": triplet,
    "batch_hard_triplet": batch_hard_triplet,
    "batch_semi_hard_triplet": batch_semi_hard_triplet,
}


def of_dimensions(entries: Entries, loss: Loss, s: EmbeddingConfig) -> Tensor:
    """The loss; with s.matryoshka_dims, the weighted sum of those of the first dimensions (Kusupati et al. 2022, arXiv
    2205.13147)."""
    if not s.matryoshka_dims:
        return loss(entries, s)
    weights = s.matryoshka_weights or [1.0] * len(s.matryoshka_dims)
    parts = [w * loss(entries.first(dims), s) for dims, w in zip(s.matryoshka_dims, weights, strict=True)]
    return torch.stack(parts).sum()
