"""One measurement of siliang: a run's own preparation and trainer, as `siliang train` uses them."""

from __future__ import annotations

from pathlib import Path

from bench.limit import MIN_RUN_TIME_S, limit_seconds
from bench.record import Measurement
from bench.steps import StepClock, set_start, settle, start_sha256
from bench.workloads import WORKLOADS, run_config
from siliang.hardware import find_device
from siliang.memory.peak import PeakMemory
from siliang.train.loop import Training
from siliang.train.prepare import prepare
from siliang.train.types import Listener


def measure(found: Measurement, scratch: Path) -> None:
    """Trains as the record's job says, and fills the record."""
    job, device = found.job, find_device()
    workload = WORKLOADS[job.workload]
    config = run_config(
        workload,
        workload.method(job.method),
        scratch,
        smoke=job.smoke,
        steps=job.warmup + job.steps,
        log_every=1 if job.purpose == "gate" else job.warmup + job.steps,
        extra=job.extra,
    )
    if job.purpose == "gate":  # in the order and the number format of the peer's default
        config.train.group_by_length, config.train.precision = False, "fp32"
        if config.quantization:
            config.quantization.compute_dtype = "fp32"
    folder = scratch / "runs" / job.name
    folder.mkdir(parents=True)
    run = prepare(config, Listener(), folder)
    found.precision = run.precision.precision
    set_start(run.model)
    found.start_sha256 = start_sha256(run.model)
    clock = StepClock(job, device)
    training = Training(run, on_step=lambda training: clock.step_ended(training.step))
    clock.tokens = lambda step: training.tokens_trained
    settle(run.model)
    with PeakMemory(device) as memory:
        training.run()
        lines = [line.model_dump() for line in training.log.lines if line.loss is not None]
        clock.fill(found, lines, memory)
    found.trained = run.record.parameters.trained
    time_s = MIN_RUN_TIME_S / 50 if job.smoke else MIN_RUN_TIME_S
    limit = limit_seconds(run, found.tokens / job.steps, device, min_run_time_s=time_s)
    found.limit_tokens_per_s = found.tokens / job.steps / limit
