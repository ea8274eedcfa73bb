"""A vector for a text: texts that belong together are near to each other.

Loss: one of `embeddings/losses.LOSSES`, of all entries of a step together. Metrics: those of embeddings/metrics.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from siliang.config import EmbeddingConfig, RunConfig
from siliang.data.example import Example
from siliang.data.examples import Related, Text
from siliang.data.prepared import EvalRows
from siliang.data.spec import NUMBERS, DataSpec, TokenColumn
from siliang.language import Bilingual
from siliang.models.spec import ModelSpec
from siliang.models.tokenizer import Tokenizer
from siliang.records import Classification
from siliang.tasks.causal_lm import verdict
from siliang.tasks.embeddings.base_vectors import check_settled, settle
from siliang.tasks.embeddings.end_token import with_end
from siliang.tasks.embeddings.ranking import NDCG, RANKING
from siliang.tasks.embeddings.tokens import TextEncoder, adapt, encoded_with, parts_of, show, synthetic_row
from siliang.tasks.metrics import ACCURACY, SPEARMAN
from siliang.tasks.related_texts import AS_COLUMNS, as_columns, in_one_line, only_pair, two_texts
from siliang.tasks.task import EntryValues, Reply, StepLoss, Task, Trained
from siliang.types import ConfigError, DataError, TaskType

if TYPE_CHECKING:  # slow to import
    from torch import Tensor
    from transformers import PreTrainedModel

    from siliang.data.batch import Batch

NEEDS = {
    "anchor-positive": Bilingual("pairs (columns anchor, positive)", "成对的文本（列 anchor、positive）"),
    "scored-pair": Bilingual(
        "scored pairs (columns sentence1, sentence2, score)", "带分数的文本对（列 sentence1、sentence2、score）"
    ),
    "text-label": Bilingual("texts with classes (columns text, label)", "带类别的文本（列 text、label）"),
}
LAYOUTS = (*AS_COLUMNS, "scored-pair", "anchor-positive", "text-label")
LEARNS_FROM = {
    "multiple_negatives": "anchor-positive",
    "triplet": "anchor-positive",
    "cosent": "scored-pair",
    "cosine": "scored-pair",
    "batch_semi_hard_triplet": "text-label",
    "batch_hard_triplet": "text-label",
}
TAKES: dict[str, tuple[str, ...]] = {  # of the settings that some losses do not take
    "multiple_negatives": ("scale", "symmetric", "negatives"),
    "triplet": ("margin", "negatives"),
    "cosent": ("scale",),
    "cosine": (),
    "batch_semi_hard_triplet": ("margin",),
    "batch_hard_triplet": ("margin",),
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


# ---- loss ----


def labelled_vectors(settings: EmbeddingConfig, output: WithStates, batch: Batch) -> Tensor:
    """The label or class, the key of the text, and the vector of each sequence, (S, EXTRAS + D), in fp32."""
    import torch
    import torch.nn.functional as F

    if settings.pooling == "auto":
        check_settled(settings)  # raises
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
        from siliang.tasks.embeddings.losses import LOSSES, Entries, of_dimensions

        entries = Entries.of(values)
        own = layout or ("text-label" if len(values[0]) == 1 else "anchor-positive")
        return of_dimensions(entries, LOSSES[loss_name(settings, own)], settings)

    alone = settings.loss in ("triplet", "cosine")
    return StepLoss(partial(labelled_vectors, settings), loss, compares=not alone)


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


def check_taken(settings: EmbeddingConfig, loss: str) -> None:
    """
    Raises:
        ConfigError: A setting has no effect with this loss.
    """
    defaults = EmbeddingConfig()
    for name in dict.fromkeys(name for names in TAKES.values() for name in names):
        value = getattr(settings, name)
        if name not in TAKES[loss] and value != getattr(defaults, name):
            raise ConfigError(
                Bilingual(
                    f"embedding.{name} has no effect with embedding.loss = {loss}: leave it out.",
                    f"embedding.loss = {loss} 不使用 embedding.{name}：请去掉。",
                )
            )


def with_settings(task: Task, config: RunConfig, learned: Classification | None) -> Task:
    """The task with the vectors and the loss of a run."""
    settings = config.embedding or EmbeddingConfig()
    found = with_vectors(task, settings)
    return replace(found, extra_files=partial(extra_files, settings, config.data.max_length))


def with_vectors(task: Task, settings: EmbeddingConfig) -> Task:
    """The task with the vectors and the loss of these settings."""
    data = replace(
        task.data,
        encoder=TextEncoder(settings),
        encoded_with=encoded_with(settings),
        adapt=partial(adapt, settings),
    )
    return replace(
        task,
        data=data,
        step_loss=step_loss(settings, ""),
        with_layout=partial(with_layout, settings),
        measure=partial(measure, settings),
        replies=partial(replies, settings),
        with_prompt=partial(with_prompt, settings),
    )


def with_prompt(settings: EmbeddingConfig, task: Task, name: str) -> Task:
    """The task with another prompt for texts that stand alone."""
    other = settings.model_copy(update={"prompt_name": name})
    return replace(task, data=replace(task.data, encoder=TextEncoder(other), encoded_with=encoded_with(other)))


def with_layout(settings: EmbeddingConfig, task: Task, layout: str) -> Task:
    """The task for rows of a layout."""
    if layout not in LAYOUTS:
        return task
    layout = as_columns(layout)
    check_taken(settings, loss_name(settings, layout))
    metrics = {"scored-pair": (SPEARMAN,), "text-label": (ACCURACY,)}.get(layout, RANKING)
    return replace(task, step_loss=step_loss(settings, layout), metrics=metrics, quality=metrics[0])


# ---- metrics ----


def measure(settings: EmbeddingConfig, found: Mapping[int, EntryValues], rows: EvalRows) -> dict[str, float]:
    """Of these vectors."""
    from siliang.tasks.embeddings import metrics

    return metrics.measure(settings, found, rows)


def replies(settings: EmbeddingConfig, found: Mapping[int, EntryValues], rows: EvalRows) -> Iterator[tuple[int, Reply]]:
    """What is nearest, by these vectors."""
    from siliang.tasks.embeddings import metrics

    return metrics.replies(settings, found, rows)


# ---- use ----


def predict(run: Trained, texts: Iterable[str | tuple[str, str] | Example]) -> Iterator[TextVector | Similarity]:
    """The vector of each text, or the similarity of two.

    Args:
        texts: A text, two texts, or both in one with a tab between them.

    Raises:
        DataError: A text is empty.
    """
    from siliang.tasks.embeddings.losses import EXTRAS

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
    if (pair := two_texts(text)) is not None:
        return Related(pair[0], (pair[1],))
    if not isinstance(text, str) or "\t" in text or not text.strip():
        given = in_one_line(text)
        raise DataError(
            Bilingual(
                f"{run.name} gives a text its vector, or two texts with a tab between them their similarity, and "
                f"{given!r} is neither.",
                f"{run.name} 给出一段文本的向量，或用制表符隔开的两段文本的相似度，而 {given!r} 两者都不是。",
            )
        )
    return Text(text)


def extra_files(
    settings: EmbeddingConfig, max_length: int, folder: Path, model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    """What sentence-transformers needs to open the folder."""
    from siliang.tasks.embeddings.sentence_files import longest_text, write_embedding

    check_settled(settings)
    ending = with_end(tokenizer) if settings.pooling == "last" else tokenizer
    write_embedding(
        settings, longest_text(max_length, model), folder, model.config.get_text_config().hidden_size, ending
    )


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
    settle=settle,
    settled_by="model",
    metrics=(*RANKING, SPEARMAN, ACCURACY),
    quality=NDCG,
    verdict=verdict,
    judged_by="base",
    inputs=("text", "text_pair"),
    inputs_layouts=("positive-messages", "anchor-positive", "text"),
    predict=predict,
    blank={"text": "", "pair": "", "vector": None, "similarity": None},
    example_prompt="a text",
    opened_by="sentence_transformers.SentenceTransformer",
)
EMBEDDING = with_vectors(_WITHOUT_LOSS, EmbeddingConfig(pooling="mean"))
