"""What follows a step of the training loop, and who asks for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Due:
    """What follows a step."""

    log: bool
    evaluate: bool
    save: bool


@dataclass(frozen=True)
class Wanted:
    """What does not come from the settings: a checkpoint by the clock, an end by a signal, an end by the clock."""

    save: bool
    stop: bool
    time_is_over: bool


@dataclass(frozen=True)
class Best:
    """The best evaluation so far, by the metric that the run chooses by."""

    step: int
    value: float
