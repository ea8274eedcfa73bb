"""The training loop. It reads from top to bottom as the run: prepare, resume, the steps; after each step log, evaluate,
save, stop.

A step is a fixed number of rows, whatever batches and ranks share it: its gradient is that of the mean loss over all
labelled tokens (or rows) of the step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from siliang.data.batch import Batch
from siliang.data.tokens import TokenSet
from siliang.distributed.sharding import full_tensors, is_sharded, reshard
from siliang.engine.batches import StepBatches
from siliang.engine.method_hooks import after_step
from siliang.engine.order import Order, WithDummies, shared_steps
from siliang.engine.random_state import RandomState, random_state, set_random_state
from siliang.run_folder import CHECKPOINTS
from siliang.train.backward import Backward
from siliang.train.due import Best, Due, Wanted
from siliang.train.errors import bad_step_error
from siliang.train.guard import Guard
from siliang.train.lines import no_better
from siliang.train.log import Log, Moment
from siliang.train.measuring import measure
from siliang.train.optimizer import make_optimizer
from siliang.train.optimizer_state import load_optimizer_state, optimizer_state
from siliang.train.reference import take_reference
from siliang.train.saving import STATE_FILE, read_state, read_weights, save_checkpoint
from siliang.train.schedule import make_schedule
from siliang.train.setup import make_accelerator, make_collator, make_engine
from siliang.train.state import check_like
from siliang.train.stopping import Timer
from siliang.train.types import Run


class Training:
    """The training of a prepared run.

    Args:
        timer: Determines when to save and to stop by the clock.
        stop: When it is set, the training stops after the current step.
        on_step: Called after each step.

    Attributes:
        step: Optimizer steps made so far.
        tokens_trained: So far, padding left out.
        stopped: Why the training ended before its last step; None where it did not.
        best: None where no evaluation was made yet, or the run does not choose its best step.
    """

    def __init__(
        self,
        run: Run,
        *,
        log: Log | None = None,
        timer: Timer | None = None,
        stop: threading.Event | None = None,
        on_step: Callable[[Training], None] = lambda training: None,
    ) -> None:
        t = run.config.train
        self.prepared, self.log, self._timer = run, log or Log(), timer or Timer()
        self._stop, self._on_step = stop or threading.Event(), on_step
        self.engine = make_engine(run)
        set_seed(t.seed)  # the engine has drawn numbers, and not the same on every device
        if not run.ranks.is_main:
            torch.manual_seed(t.seed + run.ranks.rank)  # each rank draws its own dropout
        self.accelerator = make_accelerator(run)
        self.collator = make_collator(run, self.engine)
        self._backward = Backward(run, self.engine, self.accelerator, self.collator)
        self._use(run.train_set)
        self.guard = Guard(scaled=run.precision.precision == "fp16", skips=t.nan_skips)
        self.step = self.tokens_trained = 0
        self.stopped: Literal["stopped", "out of time"] | None = None
        self.best: Best | None = None
        self._loss_since_log = torch.zeros((), device=run.device)  # of so many steps; those left out are not among them
        self._steps_since_log = 0
        self._no_better = 0  # evaluations since the best one
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})  # the last evaluation: its step, its metrics
        self._evaluation_due = False  # that of the last step was put off when the run was stopped
        self._saved_random: RandomState | None = None
        self.model: nn.Module = run.model
        self.optimizer: AcceleratedOptimizer
        self.schedule: LRScheduler

    def run(self, checkpoint: Path | None = None) -> None:
        """Makes the remaining steps.

        Args:
            checkpoint: To resume from.

        Raises:
            TrainingError: A loss or gradient is not finite, or 0 for long.
            DeviceMemoryError: A step does not fit the device.
        """
        run = self.prepared
        if checkpoint is not None:
            read_weights(checkpoint, run.model)  # before a strategy shards them
        self._prepare()
        if checkpoint is not None:
            self._resume(read_state(checkpoint), checkpoint / STATE_FILE)
        else:
            take_reference(run, self.engine, self.collator, lambda: self.accelerator.autocast())
        self.log.start(self.moment)
        self._timer.start()
        if self._evaluation_due:
            self._evaluation_due = False
            self.evaluate()
        while self.step < run.steps and not self.stopped and not self.ended_early:
            for shares, inputs in self._epoch():
                grad_norm, learning_rate = self._make_step(shares, inputs["batches"], inputs["rows"])
                self._after_step(grad_norm, learning_rate)
                if self.stopped or self.ended_early or self.step == run.steps:
                    break

    @property
    def ended_early(self) -> bool:
        """Whether train.patience evaluations in a row were not better than the best one."""
        patience = self.prepared.config.train.patience
        return patience is not None and self._no_better >= patience

    @property
    def moment(self) -> Moment:
        """Where the training is."""
        run = self.prepared
        epoch, done = divmod(max(self.step - 1, 0), run.steps_per_epoch)
        passed = epoch + (done + 1) / run.steps_per_epoch if self.step else 0.0
        passed = passed if run.stream is None else float(run.stream.passes)
        return Moment(self.step, run.steps, passed, self.tokens_trained)

    # ---- prepare ----

    def _use(self, tokens: TokenSet) -> None:
        """Takes the rows of the steps to come: all, or a block of the stream."""
        self._rows, self._lengths = tokens.number(), tokens.lengths.tolist()
        self._order = Order.of(self.prepared.config, tokens)
        self._backward.use(tokens)

    def _prepare(self) -> None:
        """The optimizer and the schedule, and what a strategy wraps around the model."""
        run, t, accelerator = self.prepared, self.prepared.config.train, self.accelerator
        reshard(run.model)  # the engine's trials leave embeddings and output layer gathered: the optimizer needs shards
        rate, eps, heads = run.record.learning_rate, run.precision.adam_eps, self.engine.task.model.heads
        optimizer = make_optimizer(run.model, t, heads=heads, learning_rate=rate, eps=eps)
        # DeepSpeed replaces these
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        if is_sharded(run.model):  # it is ready: accelerate knows no FSDP on CPUs, and would wrap it in DDP
            self.model, self.optimizer = run.model, accelerator.prepare(optimizer)
        elif run.zero_stage:
            with redirect_stdout(StringIO()):  # where each rank's DeepSpeed prints what it has built
                self.model, self.optimizer = accelerator.prepare(run.model, optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(run.model, optimizer)
        self.schedule = make_schedule(
            self.optimizer, t.schedule, peak=rate, warmup_fraction=t.warmup_fraction, steps=run.steps
        )

    # ---- the steps ----

    def _epoch(self) -> Iterator[tuple[list[list[int]], StepBatches]]:
        """The remaining steps of the current epoch: their rows by rank, and this rank's batches and row numbers."""
        epoch, done = divmod(self.step, self.prepared.steps_per_epoch)
        if (stream := self.prepared.stream) is not None:
            self._use(stream.block(epoch).tokens)
        steps = self.steps_of(epoch)[done:]
        if not done:  # a checkpoint between two epochs was made before the loader drew
            self._restore_random()
        batches = iter(self.loader(steps))  # draws a number from torch's generator
        self._restore_random()
        return zip(steps, batches, strict=True)

    def steps_of(self, epoch: int) -> list[list[list[int]]]:
        """The rows of each step of an epoch, by rank."""
        self._order.set_epoch(epoch)
        return list(shared_steps(self._order, self._lengths, self._order.step, self.prepared.ranks.size))

    def loader(self, steps: list[list[list[int]]]) -> Iterable[StepBatches]:
        """Gives the batches and the row numbers of this rank in these steps."""
        ranks = self.prepared.ranks
        rows = WithDummies(self._rows) if ranks.size > 1 else self._rows
        return DataLoader(rows, batch_sampler=[shares[ranks.rank] for shares in steps], collate_fn=self.collator)

    def _make_step(
        self, shares: list[list[int]], batches: list[Batch], rows: list[int]
    ) -> tuple[Tensor | float, float]:
        """Forward, backward, clip, update. Returns the gradient's norm and the learning rate."""
        step, t = self.step + 1, self.prepared.config.train
        self.model.train()
        loss = self._backward(self.model, shares, batches, step)
        norm = full_tensors(self.accelerator.clip_grad_norm_(self.model.parameters(), t.max_grad_norm))
        assert norm is not None  # as it would be of a DeepSpeed that has made no step
        if bad := self.guard.skip(step, loss, norm, rows):
            for p in self.model.parameters():
                p.grad = None  # which the optimizer leaves alone
            self.prepared.listener.say(self.guard.in_words(bad))
        else:
            self.guard.record(step, loss, norm, rows)
            self._loss_since_log += loss
            self._steps_since_log += 1
        self.optimizer.step()
        learning_rate = float(self.schedule.get_last_lr()[0])
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
            if not bad:
                after_step(self.model, step)
        self.model.zero_grad()
        self.tokens_trained += sum(self._lengths[i] for share in shares for i in share if i >= 0)
        self.step = step
        return norm, learning_rate

    # ---- after each step ----

    def _after_step(self, grad_norm: Tensor | float, learning_rate: float) -> None:
        due, wanted, last = self._due(), self._wanted(), self.step == self.prepared.steps
        due.save = due.save or wanted.save
        if (wanted.stop or wanted.time_is_over) and not last:
            self._stop_here(due, "stopped" if wanted.stop else "out of time")
        if self.step == 1 and not due.log:  # seen at once; the log has it among its first steps
            self.log.show_first(self.moment, self._mean_loss, float(self.schedule.get_last_lr()[0]))
        else:
            self.log.show(self.moment)
        self._on_step(self)
        if due.log or due.evaluate or due.save or self.prepared.device.type == "cpu":
            self._check()
        if due.log:
            self.log.add_loss(self.moment, self._mean_loss, learning_rate, float(grad_norm))
            self._loss_since_log, self._steps_since_log = torch.zeros_like(self._loss_since_log), 0
        if due.evaluate:
            self.evaluate()
            best = self.best.step if self.best else 0
            due.save = due.save or (self.prepared.config.train.best is not None and best == self.step)
            if self.ended_early and not last:
                self.prepared.listener.say(no_better(self.step, self._no_better, best))
                due.save = due.save or bool(self.prepared.config.train.save_every)
        if due.save:
            self.save()

    @property
    def _mean_loss(self) -> float | None:
        """Of the steps since the last line of the log; None where all were left out."""
        return float(self._loss_since_log) / self._steps_since_log if self._steps_since_log else None

    def _due(self) -> Due:
        """What the settings require after this step."""
        t, last = self.prepared.config.train, self.step == self.prepared.steps
        evaluates = t.eval_every if len(self.prepared.eval_set) else None
        return Due(
            log=last or self.step % t.log_every == 0,
            evaluate=evaluates is not None and (last or self.step % evaluates == 0),
            save=bool(t.save_every and (last or self.step % t.save_every == 0)),
        )

    def _wanted(self) -> Wanted:
        """What the clock and signals require after this step, on any rank."""
        self._timer.step_ended()
        wanted = self._timer.save_is_due, self._stop.is_set(), self._timer.time_is_over
        return Wanted(*map(any, zip(*self.prepared.ranks.gather_ints(*wanted), strict=True)))

    def _stop_here(self, due: Due, why: Literal["stopped", "out of time"]) -> None:
        """Ends the training after this step with a checkpoint; its evaluation comes first when the run is resumed."""
        self.stopped = why
        self._evaluation_due, due.evaluate, due.save = due.evaluate, False, True

    def _check(self) -> None:
        """Stops at a loss or gradient that is not a number. Waits for the device."""
        if bad := self.guard.check():
            rows = tuple(row for rows in self.prepared.ranks.gather(bad.rows) for row in rows)
            raise bad_step_error(self.prepared, replace(bad, rows=rows))

    # ---- evaluate ----

    def evaluate(self) -> dict[str, float]:
        """The metrics of the held-out rows, with `loss`. They are logged, and may be the best so far."""
        with self.log.paused():
            metrics = self.measure()
        self._evaluated = (self.step, metrics)
        self.log.add_evaluation(self.moment, metrics)
        t = self.prepared.config.train
        name = t.best or ("loss" if t.patience else None)
        name = "loss" if name is not None and self.engine.task.metric(name).of_loss else name  # the same step is best
        best = self.best.value if self.best else None
        # a finding that was accepted may leave a metric without the rows that it is of
        if name is not None and name in metrics and self.engine.task.metric(name).better(metrics[name], best):
            self.best, self._no_better = Best(self.step, metrics[name]), 0
        elif name is not None and name in metrics:
            self._no_better += 1
        return metrics

    def current_metrics(self) -> dict[str, float]:
        """The metrics of the held-out rows with the current weights; they are not computed twice for one step, unless
        the run was stopped behind its last checkpoint: then the log has them."""
        step, metrics = self._evaluated
        if step == self.step:
            return metrics
        return self.measure() if self.log.has_evaluation(self.step) else self.evaluate()

    def measure(self) -> dict[str, float]:
        """The metrics of the held-out rows."""
        return measure(self.prepared, self.engine, self.collator, self.accelerator)

    # ---- save and resume ----

    def save(self) -> None:
        """Writes a checkpoint of this step; every rank must call this."""
        run, started = self.prepared, time.perf_counter()
        with self.log.paused():
            save_checkpoint(
                run.folder / CHECKPOINTS,
                run.model,
                full_tensors(self._state()),
                keep=run.config.train.keep,
                best=self.best.step if self.best and run.config.train.best else None,
                is_main=run.ranks.is_main,
            )
            run.ranks.wait()
        self._timer.saved(time.perf_counter() - started)

    def _state(self) -> dict[str, object]:
        """The state that a resumed run needs; state.py is its schema."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "best": asdict(self.best) if self.best else None,
            "no_better": self._no_better,
            "optimizer": optimizer_state(self.prepared, self.optimizer, self._groups),
            "scheduler": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "random": self.prepared.ranks.gather(random_state()),
            "since_log": {"loss": float(self._loss_since_log), "steps": self._steps_since_log},
            "tokens_trained": self.tokens_trained,
            "guard": self.guard.state_dict(),
            "evaluation_due": self._evaluation_due,
            "log": self.log.state_dict(),
            "stream": stream.state_dict(self.step // stream.steps) if (stream := self.prepared.stream) else None,
            "reference": store.state_dict() if (store := self.engine.reference_store) else None,
        }

    def _resume(self, state: dict[str, Any], path: Path) -> None:
        """Continues from a checkpoint's state.

        Raises:
            RecordError: The state is not that of this run.
        """
        load_optimizer_state(self.prepared, self.optimizer, self._groups, state["optimizer"], path)
        check_like(state["scheduler"], self.schedule.state_dict(), "scheduler", path)
        self.schedule.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.tokens_trained = state["step"], state["tokens_trained"]
        self.best = Best(**state["best"]) if state["best"] else None
        self._no_better = state["no_better"]
        self._loss_since_log += state["since_log"]["loss"]
        self._steps_since_log = state["since_log"]["steps"]
        self.guard.load_state_dict(state["guard"])
        self.log.load_state_dict(state["log"])
        self._evaluation_due = state["evaluation_due"] and len(self.prepared.eval_set) > 0
        if (rank := self.prepared.ranks.rank) < len(state["random"]):
            self._saved_random = state["random"][rank]
        if (stream := self.prepared.stream) is not None:
            check_like(state["stream"], stream.first_state, "stream", path)
            stream.load_state_dict(state["stream"])
        if (store := self.engine.reference_store) is not None and state["reference"] is not None:
            store.load_state_dict(state["reference"])
        self._fill_frozen_cache()

    def _restore_random(self) -> None:
        """Puts the checkpoint's random state back, once."""
        if self._saved_random is not None:
            set_random_state(self._saved_random)
            self._saved_random = None

    def _fill_frozen_cache(self) -> None:
        """The last bits of a frozen layer's output depend on the batch in which a row was seen first: the steps of the
        first epoch run through the frozen layers once more, in the batches that they had."""
        padding = self.engine.padding
        if padding is None or padding.frozen is None:
            return
        before = random_state()
        inputs = self.loader(self.steps_of(0)[: self.step])
        with self.accelerator.autocast():
            self.engine.fill_frozen_cache(
                self.prepared.model, (batch.to(self.prepared.device) for step in inputs for batch in step["batches"])
            )
        set_random_state(before)
