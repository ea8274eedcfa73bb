"""One measurement of a peer: PEFT with transformers.Trainer, or a library on top of both, on the same model, data and
start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bench.peft_trainer import peft_trainer
from bench.record import Job, Measurement
from bench.steps import StepClock, set_start, settle, start_sha256
from bench.workloads import WORKLOADS, Library, Method, run_config
from siliang.config import RunConfig
from siliang.data.prepared import PreparedData
from siliang.hardware import find_device
from siliang.memory.peak import PeakMemory
from siliang.tasks.prepare import prepare_data

Rows = list[dict[str, Any]]


def measure(found: Measurement, scratch: Path, started: float) -> None:
    """Trains as the record's job says, and fills the record.

    Args:
        started: When the process began, by time.time().
    """
    job, device = found.job, find_device()
    workload = WORKLOADS[job.workload]
    method = workload.method(job.method)
    config = run_config(
        workload,
        method,
        scratch,
        smoke=job.smoke,
        steps=job.warmup + job.steps,
        log_every=1 if job.purpose == "gate" else job.warmup + job.steps,
        batch=job.batch,
    )
    data = prepare_data(config)
    trainer = builder(job.library)(config, method, job, data, scratch / "runs" / job.name)
    model: Any = trainer.model
    set_start(model)
    found.start_sha256 = start_sha256(model)
    found.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trainer.data_collator = counting = _Counting(trainer.data_collator)
    clock = StepClock(job, device, started)
    clock.tokens = counting.until
    trainer.add_callback(_Ticks(clock))
    settle(model)
    with PeakMemory(device) as memory:
        clock.begin()
        trainer.train()
        clock.fill(found, trainer.state.log_history, memory)
    found.first_pass_s = getattr(trainer, "first_pass_s_per_row", 0.0) * job.steps * config.train.batch_size


def builder(library: Library) -> Callable[[RunConfig, Method, Job, PreparedData, Path], Trainer]:
    """The function that makes a library's trainer, with the model and its adapter."""
    if library == "peft":
        return peft_trainer
    if library == "trl":
        from bench.trl_trainers import trl_trainer

        return trl_trainer
    if library == "swift":
        from bench.swift_trainer import swift_trainer

        return swift_trainer
    from bench.unsloth_trainer import unsloth_trainer

    return unsloth_trainer


class _Ticks(TrainerCallback):
    """Tells the clock of each step."""

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._clock.step_ended(state.global_step)


class _Counting:
    """A collator that counts the tokens of each batch: the loader is a batch ahead of the step."""

    def __init__(self, collate: Callable[[Rows], Any]) -> None:
        self._collate = collate
        self._tokens: list[int] = []

    def __call__(self, rows: Rows) -> Any:
        self._tokens.append(sum(map(_tokens_of, rows)))
        return self._collate(rows)

    def until(self, step: int) -> int:
        """Tokens of the first `step` batches."""
        return sum(self._tokens[:step])


def _tokens_of(row: Mapping[str, Any]) -> int:
    """Of a row, or of both sequences of a pair."""
    if "prompt_ids" in row:
        return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
    return len(row["input_ids"])
