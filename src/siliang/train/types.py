"""A run that is prepared, who hears of it, and what plans it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.distributed.device_mesh import DeviceMesh

from siliang.check import CheckInput
from siliang.config import RunConfig
from siliang.data.load import Examples
from siliang.data.prepared import EvalRows, has_unanswered
from siliang.data.stream import TokenStream
from siliang.data.tokens import TokenSet
from siliang.distributed.ranks import Ranks
from siliang.engine.evaluate import Sums
from siliang.hardware import Choice
from siliang.methods import Method
from siliang.records import Predicted, Record
from siliang.tasks import Task, task_of
from siliang.train.log import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Predicts what a run takes, from its config and data, before its model is loaded. Returns the config, which it may have
# changed, and the prediction. It is `plan.preflight.Planner`: plan/ imports train/, not the other way.
Planner = Callable[[RunConfig, CheckInput, Callable[[str], None], DeviceMesh | None], tuple[RunConfig, Predicted]]


class Base(Protocol):
    """Gives the base model of a run, as `load_base` does."""

    def __call__(
        self,
        config: RunConfig,
        labels: list[str] | None,
        tokenizer: Any,
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
        kept: torch.dtype | None = None,
    ) -> PreTrainedModel: ...


@dataclass
class Listener:
    """Callbacks during a run. Only the command prints.

    Attributes:
        say: One line about what is being done.
        progress: After every step.
        trained: With the trained model, when it has been measured and saved.
    """

    say: Callable[[str], None] = lambda line: None
    progress: Callable[[Progress], None] = lambda progress: None
    trained: Callable[[Run], None] = lambda run: None


@dataclass
class Run:
    """A run that is ready for its first step.

    Attributes:
        train_set: The training rows; of a stream, the first ones, which the plan and the checks know.
        stream: The training rows, if they are streamed.
        sums: Of the last evaluation of the held-out rows, of all ranks.
    """

    config: RunConfig
    listener: Listener
    folder: Path
    method: Method
    model: PreTrainedModel
    tokenizer: Any
    examples: Examples
    train_set: TokenSet
    eval_set: TokenSet
    precision: Choice
    record: Record
    ranks: Ranks
    device: torch.device
    stream: TokenStream | None = None
    sums: Sums = field(default_factory=Sums)

    @property
    def task(self) -> Task:
        """The task, with what the run's settings and its record say of it; but for what was chosen on the rows that
        are measured."""
        learned = self.record.classification
        return task_of(self.config, self.examples.layout, None if learned is None else learned.before_choice())

    def where(self, row: int) -> str:
        """The place of a row of the steps that are being made."""
        return self.examples.train.where(row) if self.stream is None else self.stream.where(row)

    @property
    def eval_rows(self) -> EvalRows:
        """The rows of evaluations."""
        examples = self.examples
        unanswered = self.record.unanswered or has_unanswered(examples.eval)
        step = self.config.train.rows_per_step
        return EvalRows(self.eval_set, examples.eval, examples.labels or [], unanswered=unanswered, step=step)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, or of a block of the stream."""
        if self.stream is not None:
            return self.stream.steps
        return self.config.train.steps_per_epoch(len(self.train_set))

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.train.steps(len(self.train_set))

    @property
    def epochs(self) -> float:
        """Passes over the rows of the whole run."""
        t = self.config.train
        return t.max_steps / self.steps_per_epoch if t.max_steps else t.epochs

    @property
    def zero_stage(self) -> int:
        """Of DeepSpeed's ZeRO; 0 where it is not in use."""
        return zero_stage(self.config, self.ranks)

    def write_record(self) -> None:
        """Writes run.json, once, however many processes train."""
        if self.ranks.is_main:
            self.record.write(self.folder)


def zero_stage(config: RunConfig, ranks: Ranks) -> int:
    """Of DeepSpeed's ZeRO; 0 where it is not in use, as with a single process."""
    return config.distributed.stage if ranks.size > 1 else 0
