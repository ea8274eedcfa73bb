"""What a task is: a row of the table in `tasks/__init__.py`.

`Task` is an interface of plain fields and functions. The packages that import it ask for a field and never for a task
by name, so that a new task is one file and one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from siliang.config import DataConfig, MeasureName, RunConfig, TrainConfig
from siliang.data.example import Example
from siliang.data.examples import Text
from siliang.data.messages import Conversation
from siliang.data.prepared import EvalRows
from siliang.data.spec import DataSpec
from siliang.language import Bilingual
from siliang.models.spec import ModelSpec
from siliang.models.tokenizer import Tokenizer
from siliang.records import Classification, ClassReport, Verdict
from siliang.types import ConfigError, TaskType

if TYPE_CHECKING:  # slow to import
    from torch import Tensor
    from transformers import PreTrainedModel

    from siliang.data.batch import Batch
    from siliang.data.tokens import TokenSet

# What is kept of a model's output for each row of a batch: small, and on the CPU.
Reader = Callable[[Any, "Batch", "TokenSet"], Sequence[Any]]


@dataclass(frozen=True)
class Metric:
    """A metric of a model on held-out rows.

    Attributes:
        name: Its key among a record's metrics.
        higher: More of it is better.
        of_loss: It follows from the loss: it is best where the loss is.
    """

    name: str
    higher: bool = True
    of_loss: bool = False

    def better(self, new: float, old: float | None) -> bool:
        """Whether a new value is better than the old one, or than none (None); a number is better than NaN."""
        if old is None or math.isnan(old):
            return old is None or not math.isnan(new)
        return new > old if self.higher else new < old


LOSS, EVAL_LOSS = Metric("loss", higher=False), Metric("eval_loss", higher=False)


@dataclass(frozen=True)
class StepLoss:
    """A loss of all rows of an optimizer step together, from some values of each sequence.

    The engine computes the values batch by batch and passes the gradient on in the same way, so that the memory is
    that of a batch and the result that of the whole step, on any number of devices.

    Attributes:
        values: The values of a batch's S sequences, (S, ...): an embedding, a log-probability, a score; what is right
            for each sequence is among them where the loss needs it. From the model's output, or, for a model
            that writes, from the log-probability of each labelled token, (N,), in the order of `batch.targets`.
        loss: Summed over the entries of a step. From the values of each entry, (its sequences, ...), in the order of
            the data set, and from those of the reference model. No value may depend on another batch.
        reference: The loss also takes the values that the model gives without its adapter; they have no gradient.
        separable: The loss of each entry depends on no other entry, so that each batch is run once.
        compares: An entry is compared with the others of its step, such as its negatives, so that it matters which
            they are. False only where the loss would be the same with any others.
    """

    values: Callable[[Any, Batch], Tensor]
    loss: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
    reference: bool = False
    separable: bool = False
    compares: bool = True


@dataclass(frozen=True)
class EntryValues:
    """What is kept of an entry where the loss is one of whole steps.

    Attributes:
        values: (sequences, ...), on the CPU.
        reference: Likewise, of the model without its adapter; None where the loss asks for none.
    """

    values: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True)
class HeldOutAnswers:
    """What a model says to some held-out rows, for the verdict on it.

    Attributes:
        predicted: Its answer to each.
        expected: The right one.
        majority: The share of the rows that have the most frequent class; None where there are no classes.
        classes: How many there are; None likewise.
    """

    predicted: Sequence[str]
    expected: Sequence[str]
    majority: float | None = None
    classes: int | None = None


@dataclass(frozen=True)
class Reply:
    """A model's answer to a held-out row, in words.

    Attributes:
        input: The row's text.
        expected: The right answer.
        predicted: The model's.
        correct: Whether it counts as right; None for a number, which is more or less near.
        probability: Of the model's answer; None where the answer has several parts.
    """

    input: str
    expected: str
    predicted: str
    correct: bool | None
    probability: float | None = None


@dataclass(frozen=True)
class HeldOutQuestion:
    """What a model is to write for a held-out row.

    Attributes:
        prompt: The tokens that it reads.
        reference: The right text.
    """

    prompt: Sequence[int]
    reference: str


@dataclass(frozen=True)
class Shown:
    """An entry of the training tokens, as `siliang check` shows it.

    Attributes:
        ids: The tokens that are read.
        learned: The positions of those that are learned.
        tags: The tag of each token, None for one that has none; None where the task has no tags.
        target: What is learned from all of them: a text, or tokens. None where it is among them.
    """

    ids: Sequence[int]
    learned: AbstractSet[int] = frozenset()
    tags: Sequence[str | None] | None = None
    target: str | Sequence[int] | None = None


class Prediction(Protocol):
    """A prediction: what was asked, what the model says, and how sure it is."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The text, or the two texts of a pair."""
        ...

    @property
    def predicted(self) -> str:
        """The answer in one line."""
        ...

    @property
    def probability(self) -> float | None:
        """Of the answer; None where it has several parts."""
        ...

    def values(self) -> dict[str, object]:
        """The same for JSON."""
        ...


TEXTS_AT_ONCE = 1024  # that are tokenized together; without a batch_size, their batches are of similar length


@dataclass(frozen=True)
class Trained:
    """A trained model, as a task predicts with it.

    Attributes:
        name: Of its run, for errors.
        labels: The names of classes or tags, by number.
        layout: Of the rows that it was trained on: a name of `layouts.LAYOUTS`.
        columns: The data's column of each part of the layout.
        unanswered: Some of its training questions had no answer in their context.
        read: Runs examples through the model, some at a time: (examples, their tokens, what the task's `read` keeps of
            each entry, by number).
        top: So many of the most probable classes are wanted.
        min_confidence: Below it a prediction is "no label"; None: as in the run's settings.
    """

    name: str
    labels: list[str]
    layout: str
    columns: Mapping[str, str]
    unanswered: bool
    read: Callable[[Iterable[Example]], Iterator[tuple[list[Example], TokenSet, dict[int, Any]]]]
    top: int = 1
    min_confidence: float | None = None


@dataclass(frozen=True)
class LabelHooks:
    """What a task of labels has beside the rest.

    Attributes:
        weights: Balanced weights of the classes, from the training rows and the number of classes; None: it has none.
        fit: What is chosen on held-out rows for predictions: completes the record's part.
        report: The table of the classes, from what was kept.
        ranks: Predictions can list the most probable classes.
        abstains: A prediction can be "no label".
    """

    report: Callable[[Mapping[int, Any], EvalRows], ClassReport]
    weights: Callable[[TokenSet, int], list[float]] | None = None
    fit: Callable[[Classification, Mapping[int, Any], EvalRows], Classification] | None = None
    ranks: bool = False
    abstains: bool = False


def no_metrics(loss: float, rows: EvalRows) -> dict[str, float]:
    """The metrics of a task that makes none of its loss."""
    return {}


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: As settings and records have it.
        adapter_type: The task type in the config of an adapter, one of PEFT's.
        data: What it makes of rows.
        model: What it asks of the base model.
        legend: What the display of tokens means: on a terminal, and in plain lines.
        show: An entry for the display, from its columns and the names of the labels.
        synthetic_row: An entry for the plan, as heavy as one of so many tokens can be; from these and from the most
            tokens of a target.

        writes: The model writes text. Its loss is that of each labelled token, formed without the logits of all tokens.
        has_encoder: An encoder reads, and a decoder writes the labels.
        loss: The summed loss of a batch from the model's output and the batch; None for a model that writes.
        smooths_labels: The loss takes `label_smoothing`, as that of a model that writes does.
        step_loss: The loss of a whole step, in the place of any other, where rows are compared with each other. It
            does not take `label_smoothing`.
        with_settings: The task with what the settings of a run choose, and with what its record says of its labels,
            where there is one; None where they choose nothing.
        with_layout: The task for rows of a layout, where its loss and metrics depend on that; called by `on`.
        settle: The settings with what they leave to the data or to the base model, and why it was chosen; empty where
            they say it.
        settled_by: Which of the two `settle` reads.
        counts_rows: The loss is a mean over rows that do not depend on each other: a step's rows may be chosen by
            length.

        read: What is kept of the model's output. None: the loss says it all; with `step_loss`, its values are kept, an
            `EntryValues` an entry.
        metrics: Beside the loss, by which a run may choose its best step.
        measure: The metrics of what was kept, by entry.
        libraries: Modules that `measure` imports when it is first called. A process that makes several runs loads them
            before, so that their memory does not count as the first one's.
        of_loss: Metrics that are made of the mean loss and the rows, at the end.
        of_labels: The further metrics of a run with these classes or tags.
        question: What the model is to write for an entry, from all its columns, its example and the tokenizer; None for
            an entry without an answer. A task without this field does not measure texts.
        measures: Of the texts that the model writes, at each evaluation (tasks/measures.py).
        usual_measures: Those of `siliang eval` where the settings name none.
        quality: The metric that the task is judged by.
        verdict: Why a run has learned nothing, from its metrics, the base model's, and its answers; None where it has,
            or where that cannot be seen.
        judged_by: What the verdict needs beside the run's own metrics.
        replies: The answers to held-out rows in words, from what was kept, each with the number of its example.
        majority: The share of the rows that have the most frequent class; None where there are no classes.

        inputs: The parts of a row that are given to predict, the optional ones among them.
        inputs_layouts: The names of the layouts by which rows are read that are given to predict, if not by `inputs`,
            or by those of the training; the first that fits is used.
        with_prompt: The task with another prompt (query, document or none) for texts that stand alone; None: it has
            none.
        predict: Predictions for the user's texts; None for a model that writes.
        blank: The values of an empty line among the texts, for JSON.
        prompt: The tokens that a model that writes is given, and those that end its answer; from the tokenizer, the
            settings of the data, and a conversation to answer or a text to continue.
        example_prompt: What a user may ask in one line, in words; None where that is not possible.
        labels: What it has beside these, if it learns labels or numbers of whole rows.

        extra_files: Writes what another library needs, besides the adapter or the model that are saved in a folder, to
            open it there; from the folder, the model, and the tokenizer.
        opened_by: The class of that library that opens the folder; "": the model's own in transformers.
    """

    name: TaskType
    adapter_type: TaskType
    data: DataSpec
    model: ModelSpec
    legend: tuple[str, str]
    show: Callable[[Mapping[str, Any], list[str]], Shown]
    synthetic_row: Callable[[int, int], dict[str, Any]]
    quality: Metric
    verdict: Callable[[Mapping[str, float], Mapping[str, float], HeldOutAnswers | None], Verdict | None]
    judged_by: Literal["metrics", "answers", "base"] = "metrics"

    writes: bool = False
    has_encoder: bool = False
    loss: Callable[..., Tensor] | None = None
    smooths_labels: bool = False
    step_loss: StepLoss | None = None
    with_settings: Callable[[Task, RunConfig, Classification | None], Task] | None = None
    with_layout: Callable[[Task, str], Task] | None = None
    settle: Callable[[Task, RunConfig], tuple[RunConfig, str]] | None = None
    settled_by: Literal["data", "model"] = "data"
    counts_rows: bool = False

    read: Reader | None = None
    metrics: tuple[Metric, ...] = ()
    measure: Callable[[Mapping[int, Any], EvalRows], dict[str, float]] | None = None
    libraries: tuple[str, ...] = ()
    of_loss: Callable[[float, EvalRows], dict[str, float]] = no_metrics
    of_labels: Callable[[Sequence[str]], tuple[Metric, ...]] | None = None
    question: Callable[[Mapping[str, Any], Example, Tokenizer], HeldOutQuestion | None] | None = None
    measures: tuple[MeasureName, ...] = ()
    usual_measures: tuple[MeasureName, ...] = ()
    replies: Callable[[Mapping[int, Any], EvalRows], Iterator[tuple[int, Reply]]] | None = None
    majority: Callable[[EvalRows], float | None] | None = None

    inputs: tuple[str, ...] = ()
    inputs_layouts: tuple[str, ...] = ()
    with_prompt: Callable[[Task, str], Task] | None = None
    predict: Callable[[Trained, Iterable[Any]], Iterator[Prediction]] | None = None
    blank: Mapping[str, object] = field(default_factory=dict[str, object])
    prompt: Callable[[Tokenizer, DataConfig, Conversation | Text], tuple[list[int], list[int]]] | None = None
    example_prompt: str | None = None
    extra_files: Callable[[Path, PreTrainedModel, Tokenizer], None] | None = None
    opened_by: str = ""
    labels: LabelHooks | None = None

    @property
    def title(self) -> str:
        """The name as users write it."""
        return self.data.name

    @property
    def decoder_only(self) -> bool:
        """The model writes on from what it reads, without an encoder."""
        return self.writes and not self.has_encoder

    def on(self, layout: str) -> Task:
        """The task for rows of a layout, a name of `layouts.LAYOUTS`; "" where there are no rows.

        Raises:
            ConfigError: Its settings do not fit such rows.
        """
        return self if self.with_layout is None else self.with_layout(self, layout)

    def metric(self, name: str) -> Metric:
        """The metric of that name. Of one that no run is chosen by, more is better."""
        return next((metric for metric in (LOSS, EVAL_LOSS, *self.metrics) if metric.name == name), Metric(name))

    def check_settings(self, train: TrainConfig) -> None:
        """Refuses settings of training that the task cannot follow.

        Raises:
            ConfigError: There is one.
        """
        smooths = self.step_loss is None and (self.writes or self.smooths_labels)
        if train.label_smoothing and not smooths:
            raise ConfigError(
                Bilingual(
                    f"train.label_smoothing = {train.label_smoothing:g}: {self.title} does not smooth its labels; "
                    "leave it at 0.",
                    f"train.label_smoothing = {train.label_smoothing:g}：{self.title} 不做标签平滑；请保持 0。",
                )
            )
        if train.neftune_alpha is not None and self.has_encoder:
            raise ConfigError(
                Bilingual(
                    f"train.neftune_alpha = {train.neftune_alpha:g}: not for {self.title}, whose model embeds two "
                    "texts; leave it out.",
                    f"train.neftune_alpha = {train.neftune_alpha:g}：{self.title} 的模型要嵌入两段文本，"
                    "不能使用；请去掉。",
                )
            )
