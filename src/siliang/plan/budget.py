"""What a planned run may keep: activations, and outputs of its frozen layers. The shares of memory and disk are the
engine's, which come from the engine's own functions (engine/budget.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import psutil

from siliang.config import TrainConfig
from siliang.engine.budget import cache_share, left, trained_bytes_to_come
from siliang.engine.frozen import free_disk_bytes
from siliang.plan.device import Device
from siliang.plan.fake_run import FakeRun
from siliang.plan.rows import StepRows
from siliang.plan.steps import Measured
from siliang.train.optimizer import OPTIMIZERS


@dataclass(frozen=True)
class Cached:
    """The cached outputs of frozen layers.

    Attributes:
        memory_bytes: In main memory; with a GPU, in its host's.
        disk_bytes: In a temporary file.
    """

    memory_bytes: int = 0
    disk_bytes: int = 0


def cached_outputs(
    settings: TrainConfig, device: Device, fake_run: FakeRun, step: StepRows, measured: Measured
) -> Cached:
    """Empty if no layers are frozen below the trained ones, if the run has one epoch, or without data."""
    if not fake_run.engine.frozen_layers:
        return Cached()
    wanted = int(step.cached_tokens * measured.token_bytes)
    room: float | None = None
    if device.kind == "cuda":  # the limit is the card's
        room = left("auto", 0, psutil.virtual_memory().available) if device.here else None
    elif device.memory_bytes is not None or isinstance(settings.memory_budget, int):
        taken = device.overhead_bytes + measured.peaks["loaded"].nbytes
        to_come = trained_bytes_to_come(fake_run.trained_bytes, fake_run.trained_bytes, _state_share(settings))
        room = left(settings.memory_budget, taken, (device.memory_bytes or 0) - taken) - to_come
    memory = wanted if room is None else min(wanted, cache_share(room))
    disk = wanted - memory
    return Cached(memory, min(disk, free_disk_bytes()) if device.here else disk)


def room_for_activations(
    settings: TrainConfig, device: Device, fake_run: FakeRun, measured: Measured, *, cached_bytes: int = 0
) -> float:
    """Bytes for the activations of the layers, as MemoryBudget.for_activations has them after the first batch. Infinite
    without a limit, and minus infinity if every layer recomputes in any case.

    Args:
        cached_bytes: Cached outputs of frozen layers in the same memory.
    """
    budget = settings.memory_budget
    if settings.gradient_checkpointing:
        return -math.inf
    if budget is None or (budget == "auto" and device.memory_bytes is None):
        return math.inf
    held = measured.peaks["loaded"].nbytes + fake_run.trained_bytes
    free = (device.memory_bytes or 0) - device.overhead_bytes - held
    to_come = trained_bytes_to_come(fake_run.trained_bytes, 0, _state_share(settings))
    return left(budget, device.budgeted_bytes + held, free) - to_come - cached_bytes


def _state_share(settings: TrainConfig) -> float:
    return OPTIMIZERS[settings.optimizer].state_share
