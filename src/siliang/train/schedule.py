"""The schedules of the learning rate, with the names and the values of transformers.

They are written out because transformers.optimization imports the Trainer's helpers, and with them PEFT and
bitsandbytes, where these are installed: a second, before the first step. The tests compare every value with the
Trainer's.

    rate(s) = peak s / w             for s < w
    rate(s) = peak f(p)              otherwise, p = (s - w) / (N - w)

s: steps made, w: those of the warm-up, N: all, p: the share of the steps after the warm-up that are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

MIN_RATE = 0.1  # of the peak, where a schedule ends above zero
DECAY_SHARE = 0.1  # of the steps, at the end of warmup_stable_decay
TIMESCALE = 10_000  # of inverse_sqrt, without a warm-up
LAST_RATE = 1e-7  # of polynomial


@dataclass(frozen=True)
class ScheduleSpan:
    """The steps of a training, and its peak learning rate.

    Attributes:
        warmup: w.
        steps: N.
    """

    warmup: int
    steps: int
    peak: float

    def passed(self, step: int) -> float:
        """p."""
        return (step - self.warmup) / max(1, self.steps - self.warmup)


def _constant(span: ScheduleSpan, step: int) -> float:
    return 1.0


def _linear(span: ScheduleSpan, step: int) -> float:
    return max(0.0, (span.steps - step) / max(1, span.steps - span.warmup))


def _cosine(span: ScheduleSpan, step: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * span.passed(step)))


def _cosine_with_restarts(span: ScheduleSpan, step: int) -> float:
    """One cycle, transformers' default: a cosine that ends at zero."""
    p = span.passed(step)
    return 0.5 * (1.0 + math.cos(math.pi * p)) if p < 1.0 else 0.0


def _cosine_with_min_lr(span: ScheduleSpan, step: int) -> float:
    return _cosine(span, step) * (1 - MIN_RATE) + MIN_RATE


def _polynomial(span: ScheduleSpan, step: int) -> float:
    """Of power 1, to a last rate above zero, which no peak is below."""
    last = min(LAST_RATE, span.peak)
    if step > span.steps:
        return last / span.peak
    left = 1 - (step - span.warmup) / (span.steps - span.warmup) if span.steps > span.warmup else 0.0
    return ((span.peak - last) * left + last) / span.peak


def _inverse_sqrt(span: ScheduleSpan, step: int) -> float:
    scale = span.warmup or TIMESCALE
    return 1.0 / math.sqrt((step + scale - span.warmup) / scale)


def _warmup_stable_decay(span: ScheduleSpan, step: int) -> float:
    decay = min(math.ceil(span.steps * DECAY_SHARE), span.steps - span.warmup)
    into = step - (span.steps - decay)
    if into < 0:
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (into / decay))) if into < decay else 0.0


SCHEDULES: dict[str, Callable[[ScheduleSpan, int], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "cosine_with_restarts": _cosine_with_restarts,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
}


def make_schedule(optimizer: Optimizer, name: str, *, peak: float, warmup_fraction: float, steps: int) -> LRScheduler:
    """The learning rate rises from zero over the first steps, then falls as `name` says.

    Args:
        peak: The highest rate; DeepSpeed's optimizers do not say it.
        warmup_fraction: Share of `steps` in which it rises.
    """
    span = ScheduleSpan(math.ceil(steps * warmup_fraction), steps, peak)
    return LambdaLR(optimizer, partial(_factor, SCHEDULES[name], span))


def _factor(after_warmup: Callable[[ScheduleSpan, int], float], span: ScheduleSpan, step: int) -> float:
    return step / span.warmup if step < span.warmup else after_warmup(span, step)
