"""The metrics of vectors, and the answers that they are made of.

Of pairs, how high the positives are ranked among all held-out texts; of scored pairs, the rank correlation of cosines
and scores; of texts with classes, the share whose nearest text has the same class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from siliang.config import EmbeddingConfig
from siliang.data.example import Example
from siliang.data.examples import Labelled, Related, Scored
from siliang.data.prepared import EvalRows
from siliang.tasks.embeddings.losses import Entries
from siliang.tasks.embeddings.ranking import DEPTH, in_order, ranking
from siliang.tasks.embeddings.tokens import texts_of
from siliang.tasks.metrics import ACCURACY, SPEARMAN, spearman
from siliang.tasks.task import EntryValues, Reply

AT_ONCE = 256  # anchors that are compared with all texts together


def measure(settings: EmbeddingConfig, found: Mapping[int, EntryValues], rows: EvalRows) -> dict[str, float]:
    """The metrics of the whole vectors, and the first of them for each of matryoshka_dims."""
    entries = Entries.of([kept.values for kept in found.values()])
    kind = rows.examples[0]
    metrics = metrics_of(entries, kind)
    width = entries.vectors[0].shape[1]
    for dims in settings.matryoshka_dims:
        if dims < width:
            name, value = next(iter(metrics_of(entries.first(dims), kind).items()))
            metrics[f"{name}_of_{dims}"] = value
    return metrics


def metrics_of(entries: Entries, kind: Example) -> dict[str, float]:
    """The metrics of these entries, whose examples are of a kind."""
    if isinstance(kind, Scored):
        cosines = F.cosine_similarity(entries.column(0), entries.column(1))
        return {SPEARMAN.name: spearman(cosines.tolist(), entries.scores.tolist())}
    if isinstance(kind, Labelled):
        near, classes = nearest(entries), [tuple(label) for label in entries.labels.tolist()]
        return {ACCURACY.name: sum(classes[i] == classes[j] for i, j in enumerate(near)) / len(near)}
    candidates = Candidates.of(entries)
    return ranking(candidates.positives, candidates.scores())


@dataclass(frozen=True)
class Candidates:
    """What anchors are compared with: all positives and negatives. Equal texts are one, and so are equal anchors.

    Attributes:
        anchors: Their vectors, of length 1, (Q, D).
        texts: Likewise, (T, D), in an order that their content alone decides.
        positives: Of each anchor, numbers of texts.
        anchor_of: Of each entry, the number of its anchor.
        places: Of each text, an entry and a sequence of it.
    """

    anchors: Tensor
    texts: Tensor
    positives: Sequence[set[int]]
    anchor_of: Sequence[int]
    places: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, entries: Entries) -> Candidates:
        """Those of all entries."""
        keys = [[tuple(key) for key in own.tolist()] for own in entries.keys]
        places: dict[tuple[float, ...], tuple[int, int]] = {}
        firsts: dict[tuple[float, ...], int] = {}  # the first entry of each anchor
        for i, own in enumerate(keys):
            firsts.setdefault(own[0], i)
            for j, key in enumerate(own[1:], 1):
                places.setdefault(key, (i, j))
        anchors = {key: q for q, key in enumerate(firsts)}
        numbers = {key: t for t, key in enumerate(sorted(places))}
        positives = [set[int]() for _ in anchors]
        for own in keys:
            positives[anchors[own[0]]].add(numbers[own[1]])
        where = [places[key] for key in numbers]
        A = torch.stack([entries.vectors[i][0] for i in firsts.values()])
        T = torch.stack([entries.vectors[i][j] for i, j in where])
        anchor_of = [anchors[own[0]] for own in keys]
        return cls(F.normalize(A, dim=-1), F.normalize(T, dim=-1), positives, anchor_of, where)

    def scores(self) -> Iterator[dict[int, float]]:
        """Of each anchor, the cosines of the nearest texts: the first DEPTH, and those that are as near as the last."""
        for some in self.anchors.split(AT_ONCE):
            cosines = some @ self.texts.T
            last = cosines.topk(min(DEPTH, len(self.texts))).values[:, -1:]
            for own, kept in zip(cosines, ~(cosines < last), strict=True):  # NaN is kept
                at = kept.nonzero().squeeze(1)
                yield dict(zip(at.tolist(), own[at].tolist(), strict=True))


def nearest(entries: Entries) -> list[int]:
    """The entry whose text is nearest to each text, itself and equal texts left out."""
    vectors, keys = F.normalize(entries.column(0), dim=-1), torch.stack([k[0] for k in entries.keys])
    found: list[int] = []
    for some, own in zip(vectors.split(AT_ONCE), keys.split(AT_ONCE), strict=True):
        equal = (own[:, None] == keys[None]).all(-1)
        found += (some @ vectors.T).masked_fill(equal, -torch.inf).argmax(1).tolist()
    return found


def replies(settings: EmbeddingConfig, found: Mapping[int, EntryValues], rows: EvalRows) -> Iterator[tuple[int, Reply]]:
    """The text that is nearest to each anchor, or to each text with a class; of a scored pair its cosine, which is
    right where it and the score are both above, or both below, those of most pairs."""
    entries = Entries.of([kept.values for kept in found.values()])
    every = rows.tokens.column("row").tolist()
    numbers = [every[entry] for entry in found]
    examples = [rows.examples[number] for number in numbers]
    if isinstance(examples[0], Scored):
        cosines = F.cosine_similarity(entries.column(0), entries.column(1)).tolist()
        scores = entries.scores.tolist()
        middle = median(cosines), median(scores)
        for number, example, cosine, score in zip(numbers, examples, cosines, scores, strict=True):
            right = (cosine > middle[0]) == (score > middle[1])
            yield number, Reply("\n".join(example.texts), f"{score:g}", f"{cosine:.3f}", right)
    elif isinstance(examples[0], Labelled):
        for number, example, near in zip(numbers, examples, nearest(entries), strict=True):
            other = examples[near]
            assert isinstance(example, Labelled) and isinstance(other, Labelled)
            yield number, Reply(example.text, example.label, other.label, example.label == other.label)
    else:
        yield from _nearest_texts(entries, numbers, entry_texts(settings, numbers, examples))


def entry_texts(
    settings: EmbeddingConfig, numbers: Sequence[int], examples: Sequence[Example]
) -> list[tuple[str, ...]]:
    """The texts of each entry.

    Args:
        numbers: Of each entry's example; the entries of an example follow each other.
        examples: Of each entry.
    """
    texts: list[tuple[str, ...]] = []
    at = 0
    for i, (number, example) in enumerate(zip(numbers, examples, strict=True)):
        at = at + 1 if i and numbers[i - 1] == number else 0
        assert isinstance(example, Related)
        texts.append(texts_of(example, settings)[at])
    return texts


def _nearest_texts(
    entries: Entries, numbers: Sequence[int], texts: Sequence[tuple[str, ...]]
) -> Iterator[tuple[int, Reply]]:
    candidates = Candidates.of(entries)
    best = [in_order(scores)[0] for scores in candidates.scores()]
    for number, own, anchor in zip(numbers, texts, candidates.anchor_of, strict=True):
        i, j = candidates.places[best[anchor]]
        yield number, Reply(own[0], own[1], texts[i][j], best[anchor] in candidates.positives[anchor])
