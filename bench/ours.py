"""One measurement of siliang: a run's own preparation and trainer, as `siliang train` uses them."""

from __future__ import annotations

from pathlib import Path

from bench.record import Measurement
from bench.steps import StepClock, set_start, settle, start_sha256
from bench.workloads import WORKLOADS, run_config
from siliang.hardware import find_device
from siliang.memory.peak import PeakMemory
from siliang.plan.preflight import Planner
from siliang.train.loop import Training
from siliang.train.prepare import prepare
from siliang.train.types import Listener
from siliang.types import TaskType


def measure(found: Measurement, scratch: Path, started: float) -> None:
    """Trains as the record's job says, and fills the record.

    Args:
        started: When the process began, by time.time().
    """
    job, device = found.job, find_device()
    workload = WORKLOADS[job.workload]
    config = run_config(
        workload,
        workload.method(job.method),
        scratch,
        smoke=job.smoke,
        steps=job.warmup + job.steps,
        log_every=1 if job.purpose == "gate" else job.warmup + job.steps,
        batch=job.batch,
        extra=job.extra,
    )
    if job.purpose == "gate":  # in the order and the number format of the peer's default
        config.train.group_by_length, config.train.precision = False, "fp32"
        if config.quantization:
            config.quantization.compute_dtype = "fp32"
    folder = scratch / "runs" / job.name
    folder.mkdir(parents=True)
    planner = Planner() if job.purpose == "time" else None  # as the command has; its memory is given back
    run = prepare(config, Listener(), folder, planner=planner)
    found.precision = run.precision.precision
    set_start(run.model)
    found.start_sha256 = start_sha256(run.model)
    clock = StepClock(job, device, started)
    training = Training(run, on_step=lambda training: clock.step_ended(training.step))
    clock.tokens = lambda step: training.tokens_trained
    settle(run.model)
    with PeakMemory(device) as memory:
        clock.begin()
        training.run()
        lines = [line.model_dump() for line in training.log.lines if line.loss is not None]
        clock.fill(found, lines, memory)
    found.trained = run.record.parameters.trained
    if job.purpose == "time" and config.task is not TaskType.PREFERENCE:
        from bench.limit import MIN_RUN_TIME_S, limit_seconds  # after the training, in whose start it has no part

        time_s = MIN_RUN_TIME_S / 50 if job.smoke else MIN_RUN_TIME_S
        limit = limit_seconds(run, found.tokens / job.steps, device, min_run_time_s=time_s)
        found.limit_tokens_per_s = found.tokens / job.steps / limit
