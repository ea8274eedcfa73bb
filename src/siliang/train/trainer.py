"""The thin subclass of transformers.Trainer: checkpoints that are whole or not there, resuming, counting, stopping."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from siliang.checkpoint import load_tensors, read_adapter, read_training
from siliang.engine.batches import Batch
from siliang.engine.step import Engine
from siliang.memory.peak import PeakMemory
from siliang.peft_model import PeftModel
from siliang.record import StepMetrics
from siliang.train.guard import Guard, Trouble
from siliang.types import TaskType


@dataclass(frozen=True)
class Progress:
    """Where the training is; what a progress bar shows.

    Attributes:
        logged: The loss is news: a line of the log, not only another step.
    """

    step: int
    steps: int
    loss: float | None
    learning_rate: float | None
    tokens_per_s: float
    memory_bytes: int
    eta_s: float
    logged: bool


class SiliangTrainer(Trainer):
    """transformers.Trainer around our own step, with checkpoints never half-written, and a guard on the loss.

    What the Trainer holds for a batch is the rows of a whole optimiser step, which `training_step` runs as the batches
    that its collator has made of them.

    Args:
        on_trouble: Makes the error for a loss that is no number.

    Attributes:
        tokens_trained: So far, padding left out.
    """

    def __init__(
        self, *args: Any, engine: Engine, on_trouble: Callable[[Trouble], BaseException], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.tokens_trained = 0
        self.engine, self._on_trouble = engine, on_trouble
        self._guard, self._guarded = Guard(scaled=self.args.fp16), 0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of a step's batches; the mean loss of its labelled tokens, or of its rows."""
        model.train()
        batches: list[Batch] = inputs["batches"]
        weight = self._per_rank(sum(batch.weight for batch in batches))
        whole = self.engine.run(
            model,
            batches,
            weight,
            autocast=self.accelerator.autocast,
            unsynced=lambda: self.accelerator.no_sync(model),
            backward=self.accelerator.backward,
        )
        self.tokens_trained += sum(batch.tokens for batch in batches)
        self._guard.see_batch(whole, inputs["rows"])
        return whole

    def _per_rank(self, weight: int) -> float:
        """What each rank divides its summed loss by, so that the mean of the ranks' gradients is that of all tokens."""
        if self.args.world_size == 1:
            return max(weight, 1)
        whole: Any = self.accelerator.reduce(torch.tensor(float(weight), device=self.args.device), "sum")
        return max(float(whole), 1.0) / self.args.world_size

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the Trainer's estimate is of padded batches."""
        return 0

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """For a model that writes, the mean loss of all labelled tokens, whatever batches they meet in, and without the
        logits of whole batches; for other tasks the Trainer's own."""
        if self.engine.task is not TaskType.CAUSAL_LM:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        total, weight = torch.zeros((), device=self.args.device), 0
        self.model.eval()  # type: ignore[union-attr]
        for inputs in super().get_eval_dataloader(eval_dataset):
            for batch in inputs["batches"]:
                batch = batch.to(self.args.device)
                with torch.no_grad(), self.accelerator.autocast(), self.engine.loss(self.model, batch) as loss:  # type: ignore[arg-type]
                    total += loss
                weight += batch.weight
        metrics = {f"{metric_key_prefix}_loss": float(total) / max(weight, 1)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, without padding inside of the model."""
        with self.engine.unpadded(inputs):
            return super().prediction_step(model, inputs, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Padded batches, as the Trainer's own evaluation takes them."""
        collate: Any = self.data_collator
        self.data_collator = collate.pad
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collate

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """What follows every optimiser step; the last call of an epoch has no step of its own."""
        if self.state.global_step > self._guarded:
            self._guarded = self.state.global_step
            self._guard.see_step(self._guarded, grad_norm)
        waits = self.control.should_log or self.control.should_save or self.control.should_evaluate
        if (waits or self.args.device.type == "cpu") and (trouble := self._guard.look()):
            raise self._on_trouble(trouble)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = model if model is not None else self.model
        if isinstance(target, PeftModel):
            folder = Path(resume_from_checkpoint)
            load_tensors(
                target.injection,
                target.active_adapter,
                read_adapter(folder),
                source=resume_from_checkpoint,
                training=read_training(folder),
            )
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


class Watcher(TrainerCallback):
    """Keeps the log for the record, tells about progress, and stops the training cleanly when asked to."""

    def __init__(self, memory: PeakMemory, on_progress: Callable[[Progress], None], stop: threading.Event) -> None:
        self.steps: list[StepMetrics] = []
        self.trainer: SiliangTrainer | None = None
        self._memory, self._on_progress, self._stop = memory, on_progress, stop
        self._loss: float | None = None
        self._rate: float | None = None
        self._started = self._last_time = 0.0
        self._first_step = self._last_tokens = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = self._last_time = time.perf_counter()
        self._first_step = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._stop.is_set():
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False
        self._tell(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "train_runtime" in logs:  # the Trainer's own summary
            return
        now, tokens = time.perf_counter(), self.trainer.tokens_trained if self.trainer else 0
        line = StepMetrics(
            step=state.global_step,
            epoch=round(state.epoch or 0.0, 4),
            loss=logs.get("loss"),
            eval_loss=logs.get("eval_loss"),
            accuracy=logs.get("eval_accuracy"),
            learning_rate=logs.get("learning_rate"),
            grad_norm=float(logs["grad_norm"]) if "grad_norm" in logs else None,
        )
        if line.loss is not None:
            line.tokens_per_s = round((tokens - self._last_tokens) / max(now - self._last_time, 1e-9), 1)
            self._last_time, self._last_tokens = now, tokens
            self._loss, self._rate = line.loss, line.learning_rate
        self.steps.append(line)
        self._tell(state, logged=line.loss is not None)

    def _tell(self, state: TrainerState, *, logged: bool = False) -> None:
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        done = max(state.global_step - self._first_step, 1)
        tokens = self.trainer.tokens_trained if self.trainer else 0
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
            )
        )


@contextmanager
def stopping_on_signal() -> Iterator[threading.Event]:
    """Within the block the first Ctrl-C (or SIGTERM) sets the event; the second interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
