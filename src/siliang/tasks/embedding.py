"""A vector for a text: texts that belong together are near to each other.

Loss: one of `embedding_losses.LOSSES`, of all entries of a step together. Metrics: of pairs, how high the positives are
ranked among all held-out texts; of scored pairs, the rank correlation of cosines and scores; of texts with classes, the
share whose nearest text has the same class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from siliang.config import DataConfig, EmbeddingConfig, RunConfig
from siliang.data.entries import Rows, TokenEntry, dropped
from siliang.data.examples import Example, Labelled, Related, Scored, Text
from siliang.data.pairs import CodedText, coded_texts
from siliang.data.prepared import EvalRows
from siliang.data.spec import NUMBERS, DataSpec, Encode, TokenColumn
from siliang.language import Bilingual
from siliang.models.spec import ModelSpec
from siliang.models.tokenizer import Tokenizer
from siliang.secrets import shortened
from siliang.tasks.base_vectors import resolved
from siliang.tasks.causal_lm import verdict
from siliang.tasks.end_token import with_end
from siliang.tasks.ranking import NDCG, RANKING, ranking, spearman
from siliang.tasks.related_texts import SPEARMAN, only_pair
from siliang.tasks.task import EntryValues, Metric, Reply, Shown, StepLoss, Task, Trained
from siliang.types import ConfigError, DataError, TaskType

if TYPE_CHECKING:  # slow to import
    from torch import Tensor
    from transformers import PreTrainedModel

    from siliang.data.batch import Batch

ACCURACY = Metric("accuracy")
PART = 1 << 24  # numbers below it are exact in fp32
NEEDS = {
    "anchor-positive": Bilingual("pairs (columns anchor, positive)", "成对的文本（列 anchor、positive）"),
    "scored-pair": Bilingual(
        "scored pairs (columns sentence1, sentence2, score)", "带分数的文本对（列 sentence1、sentence2、score）"
    ),
    "text-label": Bilingual("texts with classes (columns text, label)", "带类别的文本（列 text、label）"),
}
LAYOUTS = ("scored-pair", "anchor-positive", "text-label")
LEARNS_FROM = {
    "multiple_negatives": "anchor-positive",
    "triplet": "anchor-positive",
    "cosent": "scored-pair",
    "cosine": "scored-pair",
    "batch_semi_hard_triplet": "text-label",
    "batch_hard_triplet": "text-label",
}


class WithStates(Protocol):
    """The output of a model without a head, (S, W, D), virtual tokens first."""

    last_hidden_state: Tensor


@dataclass(frozen=True)
class TextVector:
    """A text and its vector."""

    text: str
    vector: tuple[float, ...]
    probability: None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The text."""
        return (self.text,)

    @property
    def predicted(self) -> str:
        """The first numbers, and how many there are."""
        return f"[{', '.join(f'{x:.4f}' for x in self.vector[:4])}, ...] ({len(self.vector)})"

    def values(self) -> dict[str, object]:
        """The same for JSON: all numbers, with as many digits as fp32 has."""
        return {"text": self.text, "vector": [float(f"{x:.9g}") for x in self.vector]}


@dataclass(frozen=True)
class Similarity:
    """How near two texts are: the cosine of their vectors."""

    text: str
    pair: str
    similarity: float
    probability: None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Both texts."""
        return (self.text, self.pair)

    @property
    def predicted(self) -> str:
        """The cosine."""
        return f"{self.similarity:.4f}"

    def values(self) -> dict[str, object]:
        """The same for JSON."""
        return {"text": self.text, "pair": self.pair, "similarity": round(self.similarity, 6)}


# ---- tokens ----


@dataclass(frozen=True)
class TextEncoder:
    """Makes the function that turns examples into entries."""

    settings: EmbeddingConfig

    def __call__(self, tokenizer: Tokenizer, data: DataConfig, labels: list[str]) -> Encode:
        ending = with_end(tokenizer) if self.settings.pooling == "last" else tokenizer
        return partial(encode, ending, data, self.settings)


def encode(
    tokenizer: Tokenizer, data: DataConfig, settings: EmbeddingConfig, examples: Sequence[Example]
) -> list[Rows]:
    """The texts of each example as sequences: for each positive the anchor, the positive and the negatives; the two
    texts of a scored pair; or a single text.
    """
    groups = [texts_of(example, settings) for example in examples]
    prompts = (settings.query_prompt or "", settings.document_prompt or "")
    prompted = [
        prompts[i > 0 or isinstance(example, Text)] + text
        for example, entries in zip(examples, groups, strict=True)
        for texts in entries
        for i, text in enumerate(texts)
    ]
    coded = iter(coded_texts(tokenizer, prompted, [None] * len(prompted), data.max_length) if prompted else ())
    rows: list[Rows] = []
    for example, entries in zip(examples, groups, strict=True):
        found = [[next(coded) for _ in texts] for texts in entries]
        if data.too_long == "drop" and any(text.lost for texts in found for text in texts):
            rows.append(dropped(labels=0))
        else:
            rows.append([_entry(texts, example) for texts in found])
    return rows


def texts_of(example: Example, settings: EmbeddingConfig) -> list[tuple[str, ...]]:
    """The texts of each entry of an example."""
    match example:
        case Related():
            negatives = example.negatives[: settings.negatives]
            return [(example.anchor, positive, *negatives) for positive in example.positives]
        case Scored():
            return [(example.text, example.pair)]
        case _:
            assert isinstance(example, Labelled | Text)
            return [(example.text,)]


def adapt(settings: EmbeddingConfig, example: Example) -> Example | str:
    """The example, or what its loss lacks in it."""
    if settings.loss == "triplet" and isinstance(example, Related) and not example.negatives[: settings.negatives]:
        return Bilingual(
            "has no negative, which embedding.loss = triplet needs: use multiple_negatives",
            "没有负例，而 embedding.loss = triplet 需要负例：请用 multiple_negatives",
        )
    if settings.loss == "cosine" and isinstance(example, Scored) and not -1.0 <= example.score <= 1.0:
        return Bilingual(
            f"has the score {example.score:g}, and embedding.loss = cosine takes -1 to 1: divide the scores, or use "
            "cosent, which takes their order alone",
            f"的分数是 {example.score:g}，而 embedding.loss = cosine 只接受 -1 到 1：请缩放分数，"
            "或改用只看高低顺序的 cosent",
        )
    return example


def _entry(texts: list[CodedText], example: Example) -> TokenEntry:
    label: list[float] = [0.0, 0.0]
    if isinstance(example, Scored):
        label[0] = example.score
    elif isinstance(example, Labelled):
        label = parts_of(hashlib.blake2b(example.label.encode("utf-8", "surrogatepass")).digest())
    entry: Any = {
        "input_ids": [token for text in texts for token in text.ids],
        "sequences": [len(text.ids) for text in texts],
        "labels": label[0],
        "labels_low": label[1],
        "lost": sum(text.lost for text in texts),
    }
    return entry


def parts_of(key: bytes) -> list[float]:
    """The first bytes of a hash as two numbers that fp32 holds exactly."""
    return [float(int.from_bytes(key[i : i + 3], "little")) for i in (0, 3)]


def synthetic_row(length: int, target_length: int) -> dict[str, Any]:
    """A pair of so many tokens each."""
    labels = {"labels": 0.0, "labels_low": 0.0}
    return {"input_ids": [1] * 2 * length, "sequences": [length, length], **labels}


def show(row: Mapping[str, Any], labels: list[str]) -> Shown:
    """The first text, and the others behind it."""
    first = row["sequences"][0]
    return Shown(row["input_ids"][:first], target=row["input_ids"][first:] or None)


# ---- loss ----


def labelled_vectors(settings: EmbeddingConfig, output: WithStates, batch: Batch) -> Tensor:
    """The label or class, the key of the text, and the vector of each sequence, (S, EXTRAS + D), in fp32."""
    import torch
    import torch.nn.functional as F

    states = output.last_hidden_state[:, -batch.width :].float()  # virtual tokens come first
    lengths = torch.tensor(batch.lengths, device=states.device)
    if settings.pooling == "last":
        vectors = states[torch.arange(len(states), device=states.device), lengths - 1]
    elif settings.pooling == "cls":
        vectors = states[:, 0]
    else:
        inside = torch.arange(states.shape[1], device=states.device)[None] < lengths[:, None]
        vectors = (states * inside[..., None]).sum(1) / lengths[:, None]
    if settings.normalize:
        vectors = F.normalize(vectors, dim=-1)
    keys = torch.tensor([parts_of(key) for key in batch.keys], device=states.device)
    labels = torch.stack([batch.inputs["labels"], batch.inputs["labels_low"]], -1)
    return torch.cat([labels, keys, vectors], -1)


def step_loss(settings: EmbeddingConfig, layout: str) -> StepLoss:
    """The loss of these settings on rows of a layout; "" where that is not known."""

    def loss(values: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
        from siliang.tasks.embedding_losses import LOSSES, Entries, of_dimensions

        entries = Entries.of(values)
        own = layout or ("text-label" if len(values[0]) == 1 else "anchor-positive")
        return of_dimensions(entries, LOSSES[loss_name(settings, own)], settings)

    return StepLoss(partial(labelled_vectors, settings), loss)


def loss_name(settings: EmbeddingConfig, layout: str) -> str:
    """The loss for rows of a layout.

    Raises:
        ConfigError: The loss of the settings does not learn from such rows.
    """
    fits = [name for name, wanted in LEARNS_FROM.items() if wanted == layout]
    if settings.loss == "auto":
        return fits[0]
    if settings.loss not in fits:
        need, here, names = NEEDS[LEARNS_FROM[settings.loss]], NEEDS[layout], ", ".join(fits)
        raise ConfigError(
            Bilingual(
                f"embedding.loss = {settings.loss} learns from {need}, and the rows are {here}: use {names}.",
                f"embedding.loss = {settings.loss} 需要{need.zh}，而这里是{here.zh}：请用 {names}。",
            )
        )
    return settings.loss


def with_settings(task: Task, config: RunConfig) -> Task:
    """The task with the vectors and the loss of a run."""
    settings = resolved(config)
    found = with_vectors(task, settings)
    return replace(found, extra_files=partial(extra_files, settings, config.data.max_length))


def with_vectors(task: Task, settings: EmbeddingConfig) -> Task:
    """The task with the vectors and the loss of these settings."""
    data = replace(
        task.data,
        encoder=TextEncoder(settings),
        encoded_with=settings.model_dump_json(),
        adapt=partial(adapt, settings),
    )
    return replace(
        task,
        data=data,
        step_loss=step_loss(settings, ""),
        with_layout=partial(with_layout, settings),
        measure=partial(measure, settings),
    )


def with_layout(settings: EmbeddingConfig, task: Task, layout: str) -> Task:
    """The task for rows of a layout."""
    if layout not in LAYOUTS:
        return task
    loss_name(settings, layout)
    metrics = {"scored-pair": (SPEARMAN,), "text-label": (ACCURACY,)}.get(layout, RANKING)
    return replace(task, step_loss=step_loss(settings, layout), metrics=metrics, quality=metrics[0])


# ---- metrics ----


def measure(settings: EmbeddingConfig, found: Mapping[int, EntryValues], rows: EvalRows) -> dict[str, float]:
    """The metrics of the whole vectors, and the first of them for each of matryoshka_dims."""
    from siliang.tasks.embedding_losses import Entries

    entries = Entries.of([kept.values for kept in found.values()])
    kind = rows.examples[0]
    metrics = metrics_of(entries, kind)
    width = entries.vectors[0].shape[1]
    for dims in settings.matryoshka_dims:
        if dims < width:
            name, value = next(iter(metrics_of(entries.first(dims), kind).items()))
            metrics[f"{name}_of_{dims}"] = value
    return metrics


def metrics_of(entries: Any, kind: Example) -> dict[str, float]:
    """The metrics of these entries, whose examples are of a kind."""
    import torch.nn.functional as F

    if isinstance(kind, Scored):
        cosines = F.cosine_similarity(entries.column(0), entries.column(1))
        return {SPEARMAN.name: spearman(cosines.tolist(), entries.scores.tolist())}
    if isinstance(kind, Labelled):
        near, classes = nearest(entries), [tuple(label) for label in entries.labels.tolist()]
        return {ACCURACY.name: sum(classes[i] == classes[j] for i, j in enumerate(near)) / len(near)}
    return ranking(*ranked(entries))


def ranked(entries: Any) -> tuple[list[set[int]], Iterator[dict[int, float]]]:
    """The right texts of each anchor among all positives and negatives, and the nearest texts with their cosines. Equal
    texts are one, and so are equal anchors.
    """
    import torch
    import torch.nn.functional as F

    from siliang.tasks.ranking import DEPTH

    numbers: dict[tuple[float, ...], int] = {}  # of the different texts
    queries: dict[tuple[float, ...], int] = {}
    texts, anchors, right = list[Any](), list[Any](), list[set[int]]()
    for vectors, keys in zip(entries.vectors, entries.keys, strict=True):
        own = [tuple(key) for key in keys.tolist()]
        for vector, key in zip(vectors[1:], own[1:], strict=True):
            if numbers.setdefault(key, len(texts)) == len(texts):
                texts.append(vector)
        if queries.setdefault(own[0], len(anchors)) == len(anchors):
            anchors.append(vectors[0])
            right.append(set())
        right[queries[own[0]]].add(numbers[own[1]])
    A, T = F.normalize(torch.stack(anchors), dim=-1), F.normalize(torch.stack(texts), dim=-1)

    def scores() -> Iterator[dict[int, float]]:
        for some in A.split(256):
            best = (some @ T.T).topk(min(DEPTH, len(T)))
            for found, at in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                yield dict(zip(at, found, strict=True))

    return right, scores()


def nearest(entries: Any) -> list[int]:
    """The entry whose text is nearest to each text, itself and equal texts left out."""
    import torch
    import torch.nn.functional as F

    vectors, keys = F.normalize(entries.column(0), dim=-1), torch.stack([k[0] for k in entries.keys])
    found: list[int] = []
    for some, own in zip(vectors.split(256), keys.split(256), strict=True):
        equal = (own[:, None] == keys[None]).all(-1)
        found += (some @ vectors.T).masked_fill(equal, -torch.inf).argmax(1).tolist()
    return found


def replies(found: Mapping[int, EntryValues], rows: EvalRows) -> Iterator[tuple[int, Reply]]:
    """The nearest text of each first text; of a scored pair its cosine, which is right where it and the score are both
    above, or both below, those of most pairs."""
    import torch.nn.functional as F

    from siliang.tasks.embedding_losses import Entries

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
        yield from _nearest_positives(entries, numbers, examples)


def _nearest_positives(entries: Any, numbers: list[int], examples: list[Example]) -> Iterator[tuple[int, Reply]]:
    import torch
    import torch.nn.functional as F

    A, P = (F.normalize(entries.column(i), dim=-1) for i in (0, 1))
    near = torch.cat([(some @ P.T).argmax(1) for some in A.split(256)]).tolist()
    texts: list[str] = []
    at = 0
    for i, (number, example) in enumerate(zip(numbers, examples, strict=True)):
        at = at + 1 if i and numbers[i - 1] == number else 0
        assert isinstance(example, Related)
        texts.append(example.positives[at])
    for i, (number, example) in enumerate(zip(numbers, examples, strict=True)):
        assert isinstance(example, Related)
        right = texts[near[i]] in example.positives
        yield number, Reply(example.anchor, texts[i], texts[near[i]], right)


# ---- use ----


def predict(run: Trained, texts: Iterable[str | tuple[str, str] | Example]) -> Iterator[TextVector | Similarity]:
    """The vector of each text, or the similarity of two.

    Args:
        texts: A text, two texts, or both in one with a tab between them.

    Raises:
        DataError: A text is empty.
    """
    from siliang.tasks.embedding_losses import EXTRAS

    for examples, _, found in run.read(_example(run, text) for text in texts):
        for example, kept in zip(examples, found.values(), strict=True):
            vectors = kept.values[:, EXTRAS:]
            if isinstance(example, Text):
                yield TextVector(example.text, tuple(vectors[0].tolist()))
                continue
            assert isinstance(example, Related)
            a, b = vectors[0].double(), vectors[1].double()
            yield Similarity(example.anchor, example.positives[0], float(a @ b / (a.norm() * b.norm())))


def _example(run: Trained, text: str | tuple[str, str] | Example) -> Example:
    if isinstance(text, Related):
        return only_pair(text)
    if isinstance(text, Example):
        return text
    parts = text.split("\t") if isinstance(text, str) else list(text)
    if len(parts) > 2 or not all(part.strip() for part in parts):
        given = shortened("\t".join(parts), 60)
        raise DataError(
            Bilingual(
                f"{run.name} gives a text its vector, or two texts with a tab between them their similarity, and "
                f"{given!r} is neither.",
                f"{run.name} 给出一段文本的向量，或用制表符隔开的两段文本的相似度，而 {given!r} 两者都不是。",
            )
        )
    return Text(parts[0]) if len(parts) == 1 else Related(parts[0], (parts[1],))


def extra_files(
    settings: EmbeddingConfig, max_length: int, folder: Path, model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    """What sentence-transformers needs to open the folder."""
    from siliang.tasks.sentence_files import write_embedding

    ending = with_end(tokenizer) if settings.pooling == "last" else tokenizer
    write_embedding(settings, max_length, folder, model.config.get_text_config().hidden_size, ending)


FLOAT = TokenColumn(many=False, kind="float32", target=True)
_WITHOUT_LOSS = Task(
    name=TaskType.EMBEDDING,
    adapter_type=TaskType.FEATURE_EXTRACTION,
    data=DataSpec(
        name="embedding",
        layouts=LAYOUTS,
        columns={"input_ids": NUMBERS, "labels": FLOAT, "labels_low": FLOAT},
        encoder=TextEncoder(EmbeddingConfig()),
        sequences=True,
        one_layout=True,
    ),
    model=ModelSpec(task="embedding", auto_class="AutoModel", pooler=False),
    legend=(
        Bilingual("grey: a text, after ->: those that are compared with it", "灰色：一段文本；-> 之后：与它比较的文本"),
        Bilingual("->: the texts that are compared with the one above", "->：与上面的文本比较的文本"),
    ),
    show=show,
    synthetic_row=synthetic_row,
    with_settings=with_settings,
    metrics=(*RANKING, SPEARMAN, ACCURACY),
    quality=NDCG,
    replies=replies,
    verdict=verdict,
    judged_by="base",
    inputs=("text", "text_pair"),
    inputs_layouts=("anchor-positive", "text"),
    predict=predict,
    blank={"text": "", "pair": "", "vector": None, "similarity": None},
    example_prompt="a text",
)
EMBEDDING = with_vectors(_WITHOUT_LOSS, EmbeddingConfig(pooling="mean"))
