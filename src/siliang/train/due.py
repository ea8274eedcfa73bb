"""What the training loop does after a step, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Due:
    """What is done after a step, by the settings."""

    log: bool
    evaluate: bool
    save: bool


@dataclass(frozen=True)
class Wanted:
    """What is done after a step by the clock and signals: a checkpoint, a stop by a signal, a stop by the clock."""

    save: bool
    stop: bool
    time_is_over: bool


@dataclass(frozen=True)
class Best:
    """The best evaluation so far, by the metric that the run chooses by."""

    step: int
    value: float
