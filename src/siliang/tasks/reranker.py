"""A score for a query and a text: a cross-encoder, which reads both at once.

Loss: binary cross-entropy of a head with one output, as Nogueira and Cho 2019 (arXiv 1901.04085), or the squared error.
Metrics: how high the positives of a query are ranked among its negatives; of scored pairs, the rank correlation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from siliang.config import DataConfig, RerankerConfig, RunConfig
from siliang.data.entries import Rows, dropped
from siliang.data.example import Example
from siliang.data.examples import Related, Scored
from siliang.data.pairs import coded_texts
from siliang.data.prepared import EvalRows
from siliang.data.spec import NUMBERS, DataSpec, Encode, TokenColumn
from siliang.language import Bilingual
from siliang.models.spec import ModelSpec
from siliang.models.tokenizer import Tokenizer
from siliang.records import Classification
from siliang.tasks.embeddings.ranking import NDCG, RANKING, ranking
from siliang.tasks.losses import WithLogits
from siliang.tasks.metrics import ACCURACY, SPEARMAN, classification, spearman
from siliang.tasks.related_texts import AS_COLUMNS, as_columns, in_one_line, only_pair, two_texts
from siliang.tasks.task import Reply, Shown, Task, Trained
from siliang.types import TASK_HEADS, ConfigError, DataError, TaskType

if TYPE_CHECKING:  # slow to import
    from torch import Tensor
    from transformers import PreTrainedModel

    from siliang.data.batch import Batch
    from siliang.data.tokens import TokenSet

ACTIVATIONS = {
    "binary_cross_entropy": "torch.nn.modules.activation.Sigmoid",
    "mse": "torch.nn.modules.linear.Identity",
}


@dataclass(frozen=True)
class Relevance:
    """A query, a text, and how well the text fits."""

    query: str
    text: str
    score: float
    probability: None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The query and the text."""
        return (self.query, self.text)

    @property
    def predicted(self) -> str:
        """The score."""
        return f"{self.score:.4f}"

    def values(self) -> dict[str, object]:
        """The same for JSON."""
        return {"query": self.query, "text": self.text, "score": round(self.score, 6)}


# ---- tokens ----


@dataclass(frozen=True)
class PairEncoder:
    """Makes the function that turns examples into entries."""

    settings: RerankerConfig

    def __call__(self, tokenizer: Tokenizer, data: DataConfig, labels: list[str]) -> Encode:
        return partial(encode, tokenizer, data, self.settings)


def encode(tokenizer: Tokenizer, data: DataConfig, settings: RerankerConfig, examples: Sequence[Example]) -> list[Rows]:
    """Each example's pairs of a query and a text, each with its score: 1 for a positive, and 0 for a negative."""
    groups = [pairs_of(example, settings) for example in examples]
    first, second = ([pair[0] for pairs in groups for pair in pairs], [pair[1] for pairs in groups for pair in pairs])
    coded = iter(coded_texts(tokenizer, first, second, data.max_length) if first else ())
    rows: list[Rows] = []
    for pairs in groups:
        found = [(next(coded), score) for _, _, score in pairs]
        if data.too_long == "drop" and any(text.lost for text, _ in found):
            rows.append(dropped(labels=0))
            continue
        entries: Any = [
            {"input_ids": text.ids, "token_type_ids": text.types, "labels": score, "lost": text.lost}
            for text, score in found
        ]
        rows.append(entries)
    return rows


def pairs_of(example: Example, settings: RerankerConfig) -> list[tuple[str, str, float]]:
    """The pairs of an example, each with its score."""
    if isinstance(example, Scored):
        return [(example.text, example.pair, example.score)]
    assert isinstance(example, Related)
    positives = [(example.anchor, text, 1.0) for text in example.positives]
    return positives + [(example.anchor, text, 0.0) for text in example.negatives[: settings.negatives]]


def adapt(settings: RerankerConfig, example: Example) -> Example | str:
    """The example, or why its loss does not take its score."""
    bounded = settings.loss == "binary_cross_entropy"
    if bounded and isinstance(example, Scored) and not 0.0 <= example.score <= 1.0:
        return Bilingual(
            f"has the score {example.score:g}, and reranker.loss = binary_cross_entropy takes 0 to 1: divide the "
            "scores, or set reranker.loss=mse",
            f"的分数是 {example.score:g}，而 reranker.loss = binary_cross_entropy 只接受 0 到 1：请缩放分数，"
            "或设置 reranker.loss=mse",
        )
    return example


def synthetic_row(length: int, target_length: int) -> dict[str, Any]:
    """An entry of so many tokens."""
    return {"input_ids": [1] * length, "labels": 0.0}


def show(row: Mapping[str, Any], labels: list[str]) -> Shown:
    """The tokens, and the score beneath."""
    return Shown(row["input_ids"], target=f"{row['labels']:g}")


# ---- loss ----


def loss(settings: RerankerConfig, output: WithLogits, batch: Batch) -> Tensor:
    """Summed over the rows, in fp32."""
    import torch.nn.functional as F

    scores, labels = output.logits.float().squeeze(-1), batch.inputs["labels"].float()
    if settings.loss == "mse":
        return F.mse_loss(scores, labels, reduction="sum")
    return F.binary_cross_entropy_with_logits(scores, labels, reduction="sum")


def with_settings(task: Task, config: RunConfig, learned: Classification | None) -> Task:
    """The task with the loss of a run."""
    settings = config.reranker or RerankerConfig()
    return replace(with_loss(task, settings), extra_files=partial(extra_files, settings, config.data.max_length))


def with_loss(task: Task, settings: RerankerConfig) -> Task:
    """The task with the loss of these settings."""
    data = replace(
        task.data,
        encoder=PairEncoder(settings),
        encoded_with=f"negatives {settings.negatives}",
        adapt=partial(adapt, settings),
    )
    return replace(
        task,
        data=data,
        loss=partial(loss, settings),
        with_layout=partial(with_layout, settings),
        measure=partial(measure, settings),
        replies=partial(replies, settings),
        predict=partial(predict, settings),
    )


def with_layout(settings: RerankerConfig, task: Task, layout: str) -> Task:
    """The task for rows of a layout.

    Raises:
        ConfigError: A setting has no effect on such rows.
    """
    rows = as_columns(layout)
    if rows == "scored-pair" and settings.negatives is not None:
        raise ConfigError(
            Bilingual(
                "reranker.negatives has no effect on scored pairs: leave it out.",
                "带分数的文本对不使用 reranker.negatives：请去掉。",
            )
        )
    metrics = (SPEARMAN, ACCURACY) if rows == "scored-pair" else RANKING
    return replace(task, metrics=metrics, quality=metrics[0])


# ---- metrics ----


def read(output: WithLogits, batch: Batch, tokens: TokenSet) -> list[float]:
    """The logit of each row. Where a score is a probability, large ones round to 1, and their order would be lost."""
    return output.logits.float().squeeze(-1).tolist()


def scores_of(settings: RerankerConfig, logits: Iterable[float]) -> list[float]:
    """The scores as they are shown: with binary_cross_entropy probabilities."""
    import torch

    scores = torch.tensor([*logits], dtype=torch.float32)
    return (scores if settings.loss == "mse" else scores.sigmoid()).tolist()


def measure(settings: RerankerConfig, found: Mapping[int, float], rows: EvalRows) -> dict[str, float]:
    """The metrics of scored pairs, or of the candidates of each query. Equal queries are one, and so are equal texts of
    a query: with the highest of their scores, and relevant if one of them is."""
    labels = rows.tokens.column("labels").tolist()
    expected = [labels[entry] for entry in found]
    if isinstance(rows.examples[0], Scored):
        metrics = {SPEARMAN.name: spearman(list(found.values()), expected)}
        if set(expected) <= {0.0, 1.0}:
            scores = scores_of(settings, found.values())
            classes = classification([int(score > 0.5) for score in scores], [int(label) for label in expected])
            metrics[ACCURACY.name] = classes["accuracy"]
        return metrics
    relevant, scored = dict[str, set[int]](), dict[str, dict[int, float]]()
    for (_, query, text), (entry, score) in zip(pairs_of_entries(settings, found, rows), found.items(), strict=True):
        own, candidate = scored.setdefault(query, {}), number_of(text)
        own[candidate] = max(score, own.get(candidate, score))
        right = relevant.setdefault(query, set())
        if labels[entry]:
            right.add(candidate)
    return ranking([*relevant.values()], scored.values())


def number_of(text: str) -> int:
    """A number of a text, from its content alone."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def pairs_of_entries(settings: RerankerConfig, found: Iterable[int], rows: EvalRows) -> Iterator[tuple[int, str, str]]:
    """Of each entry, the number of its example, the query and the text."""
    numbers = rows.tokens.column("row").tolist()
    firsts: dict[int, int] = {}  # the first entry of each example
    for entry, number in enumerate(numbers):
        firsts.setdefault(number, entry)
    last, pairs = -1, list[tuple[str, str, float]]()
    for entry in found:
        number = numbers[entry]
        if number != last:
            last, pairs = number, pairs_of(rows.examples[number], settings)
        query, text, _ = pairs[entry - firsts[number]]
        yield number, query, text


def replies(settings: RerankerConfig, found: Mapping[int, float], rows: EvalRows) -> Iterator[tuple[int, Reply]]:
    """The score of each pair: right where it and the expected one are on the same side of the middle."""
    labels = rows.tokens.column("labels").tolist()
    expected, scores = [labels[entry] for entry in found], scores_of(settings, found.values())
    zero_to_one = min(expected) >= 0.0 and max(expected) <= 1.0
    middle = (0.5, 0.5) if zero_to_one else (median(scores), median(expected))
    pairs = pairs_of_entries(settings, found, rows)
    for (number, query, text), label, score in zip(pairs, expected, scores, strict=True):
        right = (score > middle[0]) == (label > middle[1])
        yield number, Reply(f"{query}\n{text}", f"{label:g}", f"{score:.3f}", right)


# ---- use ----


def predict(
    settings: RerankerConfig, run: Trained, pairs: Iterable[str | tuple[str, str] | Example]
) -> Iterator[Relevance]:
    """The score of each query and text, in order.

    Args:
        pairs: A query and a text, or both in one with a tab between them.

    Raises:
        DataError: One of them is missing.
    """
    for examples, _, found in run.read(_example(run, pair) for pair in pairs):
        for example, score in zip(examples, scores_of(settings, found.values()), strict=True):
            assert isinstance(example, Related)
            yield Relevance(example.anchor, example.positives[0], score)


def _example(run: Trained, pair: str | tuple[str, str] | Example) -> Related:
    if isinstance(pair, Related):
        return only_pair(pair)
    assert not isinstance(pair, Example)
    if (parts := two_texts(pair)) is None:
        given = in_one_line(pair)
        raise DataError(
            Bilingual(
                f"{run.name} scores texts for queries, and {given!r} is not both.\nGive a query and a text with a tab "
                "between them, or a file with the columns query and document: siliang predict RUN a.csv.",
                f"{run.name} 给查询与文本打分，而 {given!r} 不是查询和文本。\n"
                "请用制表符隔开查询和文本，或给出含 query 和 document 两列的文件：siliang predict RUN a.csv。",
            )
        )
    return Related(parts[0], (parts[1],))


def extra_files(
    settings: RerankerConfig, max_length: int, folder: Path, model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    """What sentence-transformers needs to open the folder as a CrossEncoder."""
    from siliang.tasks.embeddings.sentence_files import longest_text, write_reranker

    write_reranker(longest_text(max_length, model), folder, tokenizer, ACTIVATIONS[settings.loss])


_WITHOUT_LOSS = Task(
    name=TaskType.RERANKER,
    adapter_type=TaskType.SEQ_CLS,
    data=DataSpec(
        name="reranker",
        layouts=(*AS_COLUMNS, "scored-pair", "anchor-positive"),
        columns={
            "input_ids": NUMBERS,
            "token_type_ids": NUMBERS,
            "labels": TokenColumn(many=False, kind="float32", target=True),
        },
        encoder=PairEncoder(RerankerConfig()),
        one_layout=True,
    ),
    model=ModelSpec(
        task="reranker",
        auto_class="AutoModelForSequenceClassification",
        heads=TASK_HEADS[TaskType.SEQ_CLS],
        outputs=1,
        needs_padding_token=True,
    ),
    legend=(
        Bilingual("grey: read, green: the score, which is learned", "灰色：输入，绿色：要学习的分数"),
        Bilingual("->: the score, which is learned", "->：要学习的分数"),
    ),
    show=show,
    synthetic_row=synthetic_row,
    counts_rows=True,
    with_settings=with_settings,
    read=read,
    metrics=(*RANKING, SPEARMAN, ACCURACY),
    quality=NDCG,
    verdict=lambda final, base, answers: None,
    inputs=("text", "text_pair"),
    inputs_layouts=("positive-messages", "anchor-positive"),
    blank={"query": "", "text": "", "score": None},
    example_prompt="a query<TAB>a text",
    opened_by="sentence_transformers.CrossEncoder",
)
RERANKER = with_loss(_WITHOUT_LOSS, RerankerConfig())
