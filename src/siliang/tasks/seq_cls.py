"""A class for a text, or for a pair of texts.

Loss: cross-entropy of a head on the model's summary of the text. Metrics: accuracy, and F1 averaged over classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from siliang.config import DataConfig
from siliang.data.entries import Rows, dropped
from siliang.data.examples import Labelled
from siliang.data.pairs import coded_texts
from siliang.data.prepared import EvalRows
from siliang.data.spec import LABEL, NUMBERS, DataSpec, Encode
from siliang.language import Bilingual
from siliang.models.spec import ModelSpec
from siliang.models.tokenizer import Tokenizer
from siliang.records import Verdict
from siliang.secrets import shortened
from siliang.tasks.losses import WithLogits, cross_entropy
from siliang.tasks.metrics import classification
from siliang.tasks.task import HeldOutAnswers, Metric, Reply, Shown, Task, Trained
from siliang.types import TASK_HEADS, DataError, TaskType

if TYPE_CHECKING:  # slow to import
    from siliang.data.batch import Batch
    from siliang.data.tokens import TokenSet

ACCURACY, F1 = Metric("accuracy"), Metric("f1")
SLACK = 1e-9  # of metrics that are equal but for rounding


@dataclass(frozen=True)
class PredictedClass:
    """The class of a text, and how sure the model is of it."""

    text: str
    label: str
    probability: float
    pair: str | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The text, or the two of a pair."""
        return (self.text,) if self.pair is None else (self.text, self.pair)

    @property
    def predicted(self) -> str:
        """The class."""
        return self.label

    def values(self) -> dict[str, object]:
        """The same for JSON."""
        pair = {} if self.pair is None else {"pair": self.pair}
        return {"text": self.text, **pair, "label": self.label, "probability": round(self.probability, 4)}


# ---- tokens ----


def encoder(tokenizer: Tokenizer, data: DataConfig, labels: list[str]) -> Encode:
    """Makes the function that turns examples into entries."""
    return partial(encode, tokenizer, data, labels)


def encode(tokenizer: Tokenizer, data: DataConfig, labels: list[str], examples: Sequence[Labelled]) -> list[Rows]:
    """Texts, or pairs of texts, with the number of their class; a label that is empty is not known yet."""
    numbers = {name: i for i, name in enumerate(labels)} | {"": 0}
    texts, pairs = [e.text for e in examples], [e.pair for e in examples]
    rows: list[Rows] = []
    for example, coded in zip(examples, coded_texts(tokenizer, texts, pairs, data.max_length), strict=True):
        if coded.lost and data.too_long == "drop":
            rows.append(dropped(labels=0))
            continue
        number = numbers[example.label]
        rows.append([{"input_ids": coded.ids, "token_type_ids": coded.types, "labels": number, "lost": coded.lost}])
    return rows


def synthetic_row(length: int, target_length: int) -> dict[str, Any]:
    """An entry of so many tokens."""
    return {"input_ids": [1] * length, "labels": 0}


def show(row: Mapping[str, Any], labels: list[str]) -> Shown:
    """The tokens, and the class beneath."""
    return Shown(row["input_ids"], target=labels[row["labels"]])


# ---- metrics ----


def read(output: WithLogits, batch: Batch, tokens: TokenSet) -> list[tuple[int, float]]:
    """(number of the most probable class, its probability) of each row."""
    probabilities, numbers = output.logits.float().softmax(-1).max(-1)
    return list(zip(numbers.tolist(), probabilities.tolist(), strict=True))


def measure(found: Mapping[int, tuple[int, float]], rows: EvalRows) -> dict[str, float]:
    """Accuracy and F1."""
    labels = rows.tokens.column("labels").tolist()
    return classification([number for number, _ in found.values()], [labels[i] for i in found])


def majority(rows: EvalRows) -> float | None:
    """The share of the rows that have the most frequent class."""
    shares = Counter(rows.tokens.column("labels").tolist())
    return max(shares.values()) / shares.total() if shares else None


def replies(found: Mapping[int, tuple[int, float]], rows: EvalRows) -> Iterator[tuple[int, Reply]]:
    """The class of each text."""
    numbers, labels = rows.tokens.column("row").tolist(), rows.tokens.column("labels").tolist()
    for entry, (number, probability) in found.items():
        example = rows.examples[numbers[entry]]
        assert isinstance(example, Labelled)
        text = example.text if example.pair is None else f"{example.text}\n{example.pair}"
        expected, predicted = rows.labels[labels[entry]], rows.labels[number]
        yield numbers[entry], Reply(text, expected, predicted, labels[entry] == number, round(probability, 4))


def verdict(final: Mapping[str, float], base: Mapping[str, float], answers: HeldOutAnswers | None) -> Verdict | None:
    """One class for all rows, or no more correct than always giving the most frequent one."""
    if answers is None:
        return None
    if (answers.classes or 0) > 1 and len(set(answers.expected)) > 1 and len(set(answers.predicted)) == 1:
        return "one class"
    if answers.majority is not None and final.get("accuracy", 1.0) <= answers.majority + SLACK:
        return "majority"
    return None


# ---- use ----


def predict(run: Trained, texts: Iterable[str | tuple[str, str]]) -> Iterator[PredictedClass]:
    """The most probable class of each text, in order.

    Args:
        texts: Where the model was trained on pairs of texts, such pairs, or the two in one with a tab between them.

    Raises:
        DataError: The model is for pairs, and a text is alone.
    """
    for examples, _, found in run.read(_example(run, text) for text in texts):
        for example, (number, probability) in zip(examples, found.values(), strict=True):
            assert isinstance(example, Labelled)
            yield PredictedClass(example.text, run.labels[number], probability, example.pair)


def _example(run: Trained, text: str | tuple[str, str]) -> Labelled:
    if run.layout != "sentence-pair":
        return Labelled(text if isinstance(text, str) else "\t".join(text), "")
    parts = text.split("\t") if isinstance(text, str) else text
    if len(parts) != 2 or not all(part.strip() for part in parts):
        first, second = run.columns["text"], run.columns["text_pair"]
        given = shortened(text, 60)
        raise DataError(
            Bilingual(
                f"{run.name} was trained on pairs of texts, {first!r} and {second!r}, and {given!r} has no "
                f"{second!r}.\nGive both with a tab between them, or a file with both columns: siliang "
                "predict RUN a.csv.",
                f"{run.name} 是用成对的文本 {first!r} 和 {second!r} 训练的，而 {given!r} 没有 {second!r}。"
                "\n"
                "请用制表符隔开两段文本，或给出含这两列的文件：siliang predict RUN a.csv。",
            )
        )
    return Labelled(parts[0], "", parts[1])


SEQ_CLS = Task(
    name=TaskType.SEQ_CLS,
    adapter_type=TaskType.SEQ_CLS,
    data=DataSpec(
        name="seq_cls",
        layouts=("sentence-pair", "text-label"),
        columns={"input_ids": NUMBERS, "token_type_ids": NUMBERS, "labels": LABEL},
        encoder=encoder,
        named="label",
        one_layout=True,
    ),
    model=ModelSpec(
        task="seq_cls",
        auto_class="AutoModelForSequenceClassification",
        heads=TASK_HEADS[TaskType.SEQ_CLS],
        needs_padding_token=True,
    ),
    legend=(
        Bilingual("grey: read, green: the class, which is learned", "灰色：输入，绿色：要学习的类别"),
        Bilingual("->: the class, which is learned", "->：要学习的类别"),
    ),
    show=show,
    synthetic_row=synthetic_row,
    loss=cross_entropy,
    smooths_labels=True,
    counts_rows=True,
    read=read,
    metrics=(ACCURACY, F1),
    measure=measure,
    quality=ACCURACY,
    majority=majority,
    replies=replies,
    verdict=verdict,
    judged_by="answers",
    inputs=("text", "text_pair"),
    predict=predict,
    blank={"text": "", "label": None, "probability": None},
    example_prompt="a text",
)
