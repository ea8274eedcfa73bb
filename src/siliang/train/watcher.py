"""The training watched from outside its steps: the log, progress, when to save and to stop, which step was the best."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from siliang.distributed.ranks import find_ranks
from siliang.memory.peak import PeakMemory
from siliang.records import StepMetrics
from siliang.tasks import find_figure

if TYPE_CHECKING:
    from siliang.train.trainer import SiliangTrainer


@dataclass(frozen=True)
class Progress:
    """Where the training is; what a progress bar shows.

    Attributes:
        logged: The loss is news: a line of the log, not only another step.
        measured: What an evaluation in this step found; None where there was none.
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


@dataclass
class Limits:
    """What makes the watcher save, stop, or choose.

    Attributes:
        save_every_s: Seconds between two checkpoints.
        stop_at: When to have stopped, by time.monotonic().
        save_s: What a checkpoint is expected to take before one was made.
        best: The metric whose best step is kept.
    """

    save_every_s: float | None = None
    stop_at: float | None = None
    save_s: float = 0.0
    best: str | None = None


class Watcher(TrainerCallback):
    """Keeps the log for the record, tells about progress, and saves, stops and chooses the best step as it is told to.

    Attributes:
        steps: The log.
        stopped: Why the training was stopped before its end; None where it was not.
        train_s: Seconds of training, those before a resume included.
    """

    def __init__(
        self,
        memory: PeakMemory,
        on_progress: Callable[[Progress], None],
        stop: threading.Event,
        limits: Limits | None = None,
    ) -> None:
        self.steps: list[StepMetrics] = []
        self.trainer: SiliangTrainer | None = None
        self.stopped: str | None = None
        self._memory, self._on_progress, self._stop = memory, on_progress, stop
        self._limits = limits or Limits()
        self._loss: float | None = None
        self._rate: float | None = None
        self._started = self._last_time = self._last_step_time = self._last_save = 0.0
        self._slowest_step_s = self._before_s = 0.0
        self._first_step = self._last_tokens = self._first_tokens = 0

    @property
    def train_s(self) -> float:
        return self._before_s + time.perf_counter() - self._started

    def watch(self, trainer: SiliangTrainer) -> None:
        """Belongs to `trainer` from now on."""
        self.trainer = trainer
        trainer.watcher = self

    def state(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        steps = [line.model_dump() for line in self.steps]
        return {"steps": steps, "train_s": self.train_s, "loss": self._loss, "rate": self._rate}

    def go_on(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""
        self.steps[:] = [StepMetrics(**line) for line in state["steps"]]
        self._before_s, self._loss, self._rate = state["train_s"], state["loss"], state["rate"]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = self._last_time = self._last_step_time = self._last_save = time.perf_counter()
        self._first_step = state.global_step
        if self.trainer is not None:
            self.trainer.go_on()
            self._last_tokens = self._first_tokens = self.trainer.tokens_trained

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now, limits = time.perf_counter(), self._limits
        # the first step of a process also warms up what the others use
        self._slowest_step_s = max(self._slowest_step_s, now - self._last_step_time)
        self._last_step_time = now
        saves = limits.save_every_s is not None and now - self._last_save >= limits.save_every_s
        late = limits.stop_at is not None and time.monotonic() + self._reserve_s() >= limits.stop_at
        votes = saves, self._stop.is_set(), late
        if self.trainer is not None:  # what one rank wants, all do, in the same step
            votes = tuple(map(any, zip(*self.trainer.ranks.gather_ints(*votes), strict=True)))
        saves, told, late = votes
        if saves:
            control.should_save = True
        if told or late:
            self.stopped = "stopped" if told else "out of time"
        if self.stopped and state.global_step < state.max_steps:
            control.should_training_stop = control.should_save = True
            if self.trainer is not None:  # it comes first when the run goes on
                self.trainer.evaluation_due = control.should_evaluate
            control.should_evaluate = False
        if state.global_step == state.max_steps:  # however few steps there are, the last one's loss is seen
            control.should_log = True
        first = state.global_step == 1 and self.trainer is not None and not control.should_log
        if first:  # it is seen at once that the training is under way; the log has it among its first steps
            assert self.trainer is not None
            self._loss, self._rate = float(self.trainer._tr_loss), _rate(self.trainer)
        self._tell(state, logged=first)

    def _reserve_s(self) -> float:
        """Seconds that one more step, which may evaluate, and the checkpoint after it may take."""
        save_s = self.trainer.slowest_save_s if self.trainer else 0.0
        return 2 * self._slowest_step_s + 2 * max(save_s, self._limits.save_s) + 1.0

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last_save = time.perf_counter()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        """Remembers the best step, whose checkpoint is made at once."""
        best = self._limits.best
        found = (metrics or {}).get(f"eval_{best}")
        if best is not None and found is not None and find_figure(best).better(float(found), state.best_metric):
            state.best_metric, state.best_global_step = float(found), state.global_step
            control.should_save = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        state.log_history.clear()  # the same as `steps`, once more in every checkpoint
        if "train_runtime" in logs:  # the Trainer's own summary
            return
        now, tokens = time.perf_counter(), self.trainer.tokens_trained if self.trainer else 0
        line = StepMetrics(
            step=state.global_step,
            epoch=round(state.epoch or 0.0, 4),
            loss=logs.get("loss"),
            eval_loss=logs.get("eval_loss"),
            metrics={
                name.removeprefix("eval_"): float(value)
                for name, value in logs.items()
                if name.startswith("eval_") and name != "eval_loss"
            },
            learning_rate=logs.get("learning_rate"),
            grad_norm=float(logs["grad_norm"]) if "grad_norm" in logs else None,
        )
        if line.loss is not None:
            line.tokens_per_s = round((tokens - self._last_tokens) / max(now - self._last_time, 1e-9), 1)
            self._last_time, self._last_tokens = now, tokens
            self._loss, self._rate = line.loss, line.learning_rate
        self.steps.append(line)
        found = {name: float(value) for name, value in logs.items() if _is_metric(name)}
        self._tell(state, logged=line.loss is not None, measured=found or None)

    def _tell(self, state: TrainerState, *, logged: bool = False, measured: dict[str, float] | None = None) -> None:
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        done = max(state.global_step - self._first_step, 1)
        tokens = (self.trainer.tokens_trained if self.trainer else 0) - self._first_tokens
        self._on_progress(
            Progress(
                step=state.global_step,
                steps=state.max_steps,
                loss=self._loss,
                learning_rate=self._rate,
                tokens_per_s=tokens / elapsed,
                memory_bytes=self._memory.update(),
                eta_s=elapsed / done * (state.max_steps - state.global_step),
                logged=logged,
                measured=measured,
            )
        )


def _rate(trainer: SiliangTrainer) -> float | None:
    """The learning rate of the next step."""
    scheduler: Any = trainer.lr_scheduler
    return float(scheduler.get_last_lr()[0]) if scheduler is not None else None


def _is_metric(name: str) -> bool:
    """Of what an evaluation logs, a figure of the model's, not of the clock's."""
    clock = ("_runtime", "_per_second", "_preparation_time")
    return name.startswith("eval_") and not name.endswith(clock) and "_mem_" not in name


@contextmanager
def stopping_on_signal() -> Iterator[threading.Event]:
    """Within the block the first Ctrl-C (or SIGTERM) sets the event; the second interrupts at once. Where a launcher
    passes on what the terminal has sent already, one that follows within a moment is the same."""
    stop = threading.Event()
    first = 0.0
    moment_s = 2.0 if find_ranks().size > 1 else 0.0
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        nonlocal first
        if stop.is_set() and time.monotonic() - first >= moment_s:
            raise KeyboardInterrupt
        if not stop.is_set():
            first = time.monotonic()
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
