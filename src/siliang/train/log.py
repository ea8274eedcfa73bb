"""The log of a training: the lines that the record keeps, and what a progress bar shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypedDict

from siliang.memory.peak import PeakMemory
from siliang.records import StepMetrics
from siliang.train.tracking import Trackers


@dataclass(frozen=True)
class Progress:
    """Where the training is; what a progress bar shows.

    Attributes:
        logged: The loss is news: a line of the log, not only another step.
        measured: The metrics of an evaluation in this step; None where there was none.
    """

    step: int
    steps: int
    loss: float | None
    learning_rate: float | None
    tokens_per_s: float
    memory_bytes: int
    eta_s: float
    logged: bool
    measured: dict[str, float] | None = None


@dataclass(frozen=True)
class Moment:
    """A step of a training, as the log needs it.

    Attributes:
        step: Optimizer steps made so far, of `steps`.
        epoch: Passes over the rows so far.
        tokens: Trained on so far.
    """

    step: int
    steps: int
    epoch: float
    tokens: int


class LogState(TypedDict):
    """What a resumed run has to know: the lines, the seconds of training, the last loss and learning rate."""

    steps: list[dict[str, object]]
    train_s: float
    steps_s: float
    loss: float | None
    rate: float | None


class Log:
    """Keeps the lines of the record, and reports progress.

    Args:
        on_progress: Called after every step and every evaluation.
        memory: Whose peak is reported.
        trackers: Get each line.

    Attributes:
        lines: Of the record.
    """

    def __init__(
        self,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        memory: PeakMemory | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        self.lines: list[StepMetrics] = []
        self._on_progress, self._memory, self._trackers = on_progress, memory, trackers or Trackers()
        self._loss: float | None = None
        self._rate: float | None = None
        self._before_s = 0.0  # of training, before a resume
        self._steps_s = 0.0  # of the steps that were made, up to the last pause
        self._started = time.perf_counter()
        self._since: float | None = self._started  # start of the present steps; None during an evaluation or a save
        self._first = Moment(0, 0, 0.0, 0)
        self._first_s = self._last_s = 0.0  # of the steps, when the training began, and at the last line
        self._last_tokens = 0

    @property
    def train_s(self) -> float:
        """Seconds of training, those before a resume and those of evaluations and checkpoints included."""
        return self._before_s + time.perf_counter() - self._started

    @property
    def steps_s(self) -> float:
        """Seconds of the steps alone, those before a resume included."""
        return self._steps_s + (0.0 if self._since is None else time.perf_counter() - self._since)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block no step is made: an evaluation, or a checkpoint."""
        self._steps_s, self._since = self.steps_s, None
        try:
            yield
        finally:
            self._since = time.perf_counter()

    def start(self, at: Moment) -> None:
        """The training begins, or resumes."""
        self._trackers.start(self.lines)
        self._started = self._since = time.perf_counter()
        self._first_s = self._last_s = self._steps_s
        self._first, self._last_tokens = at, at.tokens

    def add_loss(self, at: Moment, loss: float | None, learning_rate: float, grad_norm: float) -> None:
        """A line with the mean loss of the steps since the last one; None where all of them were left out."""
        now = self.steps_s
        tokens_per_s = (at.tokens - self._last_tokens) / max(now - self._last_s, 1e-9)
        line = StepMetrics(
            step=at.step,
            epoch=round(at.epoch, 4),
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens_per_s=round(tokens_per_s, 1),
        )
        self._add(line)
        self._last_s, self._last_tokens = now, at.tokens
        self._loss, self._rate = loss, learning_rate
        self.show(at, logged=True)

    def add_evaluation(self, at: Moment, metrics: dict[str, float]) -> None:
        """A line with the metrics of an evaluation, `loss` among them."""
        others = {name: value for name, value in metrics.items() if name != "loss"}
        self._add(StepMetrics(step=at.step, epoch=round(at.epoch, 4), eval_loss=metrics["loss"], metrics=others))
        self.show(at, measured=metrics)

    def has_evaluation(self, step: int) -> bool:
        """Whether an evaluation after this step, the last one, has its line."""
        return any(line.step == step and line.eval_loss is not None for line in self.lines[-2:])

    def _add(self, line: StepMetrics) -> None:
        self.lines.append(line)
        self._trackers.log(line, self._memory.update() if self._memory else 0)

    def show_first(self, at: Moment, loss: float | None, learning_rate: float) -> None:
        """Shows the loss of the first step at once; its line comes with those of the steps after it."""
        self._loss, self._rate = loss, learning_rate
        self.show(at, logged=True)

    def show(self, at: Moment, *, logged: bool = False, measured: dict[str, float] | None = None) -> None:
        """Reports progress."""
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        done = max(at.step - self._first.step, 1)
        self._on_progress(
            Progress(
                step=at.step,
                steps=at.steps,
                loss=self._loss,
                learning_rate=self._rate,
                tokens_per_s=(at.tokens - self._first.tokens) / max(self.steps_s - self._first_s, 1e-9),
                memory_bytes=self._memory.update() if self._memory else 0,
                eta_s=elapsed / done * (at.steps - at.step),
                logged=logged,
                measured={f"eval_{name}": value for name, value in measured.items()} if measured else None,
            )
        )

    def state_dict(self) -> LogState:
        """What a resumed run has to know."""
        lines = [line.model_dump() for line in self.lines]
        return {
            "steps": lines,
            "train_s": self.train_s,
            "steps_s": self.steps_s,
            "loss": self._loss,
            "rate": self._rate,
        }

    def load_state_dict(self, state: LogState) -> None:
        """Continues from a `state_dict`."""
        self.lines[:] = [StepMetrics.model_validate(line) for line in state["steps"]]
        self._before_s, self._steps_s = state["train_s"], state["steps_s"]
        self._loss, self._rate = state["loss"], state["rate"]
