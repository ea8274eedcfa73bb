"""Watches the loss and the gradient norm of each step. A run stops where one of them is nan, infinite, or exactly zero
for long: nothing is learned from there on. Where the user allows it (`train.on_nan: skip N`), a few non-finite steps
are skipped before they touch a weight.

Losses and norms stay on the device. They are read when something else waits for the device anyhow (a line of the log, a
checkpoint), so that a GPU need not wait at every step. On the CPU they are read at every step.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from siliang.language import both

USELESS_STEPS = (
    25  # steps of exact zeros; or, under fp16, of infinite gradients: the loss scale halves 16 times at most
)


@dataclass(frozen=True)
class BadStep:
    """A step from which nothing is learned.

    Attributes:
        what: "loss" or "gradient".
        value: nan, inf or 0.
        step: The optimizer step in which it began, from 1.
        rows: The numbers of the examples in that step.
    """

    what: str
    value: float
    step: int
    rows: tuple[int, ...]


@dataclass
class _Unread:
    step: int
    rows: tuple[int, ...]
    loss: Tensor
    grad_norm: Tensor


class GuardState(TypedDict):
    """What a resumed run has to know: how long each useless thing has lasted, the skipped steps, the steps seen."""

    runs: dict[str, int]
    skipped: list[int]
    steps: int


class Guard:
    """Watches one training.

    Args:
        scaled: The loss is scaled for fp16: a gradient may overflow now and then, and the scaler skips the step.
        skips: Non-finite steps that may be skipped.

    Attributes:
        skipped: The steps that were.
    """

    def __init__(self, *, scaled: bool, skips: int = 0) -> None:
        self.skipped: list[int] = []
        self.skips = skips
        self._scaled = scaled
        self._unread: deque[_Unread] = deque()
        self._steps, self._last_rows = 0, ()  # of the steps that were read
        self._runs = {"zero loss": 0, "zero gradient": 0, "lost gradient": 0}

    def skip(self, step: int, loss: Tensor, grad_norm: Tensor | float, rows: list[int]) -> BadStep | None:
        """What is wrong with a step that must not be made; None where it is to be made. Waits for the device.

        Args:
            loss: Of the step, a scalar.
            rows: The numbers of its examples.
        """
        if len(self.skipped) >= self.skips:
            return None
        value, norm = float(loss), float(grad_norm)
        if math.isfinite(value) and (math.isfinite(norm) or self._scaled):
            return None
        self.skipped.append(step)
        what, value = ("gradient", norm) if math.isfinite(value) else ("loss", value)
        return BadStep(what, value, step, tuple(rows))

    def in_words(self, bad: BadStep) -> str:
        """A line on a step that was skipped."""
        n, what = len(self.skipped), bad.what
        what_zh = {"loss": "损失", "gradient": "梯度"}[what]
        return both(
            f"warning    step {bad.step:,} is left out ({n} of at most {self.skips}): its {what} is {bad.value:g}",
            f"警告       跳过第 {bad.step:,} 步（第 {n} 次，最多 {self.skips} 次）：{what_zh}为 {bad.value:g}",
        )

    def record(self, step: int, loss: Tensor, grad_norm: Tensor | float, rows: list[int]) -> None:
        """A step that was made; it is judged by the next `check`."""
        loss = loss.detach().float()
        norm = torch.as_tensor(grad_norm, dtype=torch.float32, device=loss.device)
        self._unread.append(_Unread(step, tuple(rows), loss, norm))

    def check(self) -> BadStep | None:
        """What has gone wrong since the last check. Waits for the device."""
        if not self._unread:
            return None
        values = torch.stack([torch.stack((s.loss, s.grad_norm)) for s in self._unread]).tolist()
        steps, self._unread = list(self._unread), deque()
        for s, (loss, norm) in zip(steps, values, strict=True):
            self._steps, self._last_rows = self._steps + 1, s.rows
            if not math.isfinite(loss):
                return BadStep("loss", loss, s.step, s.rows)
            if not math.isfinite(norm) and not self._scaled:
                return BadStep("gradient", norm, s.step, s.rows)
            for name, value, now in (
                ("zero loss", loss, loss == 0),
                ("zero gradient", norm, norm == 0),
                ("lost gradient", norm, not math.isfinite(norm)),
            ):
                self._runs[name] = self._runs[name] + 1 if now else 0
                if self._runs[name] == USELESS_STEPS:
                    return BadStep(name.split()[1], value, s.step - USELESS_STEPS + 1, s.rows)
        return None

    def check_end(self) -> BadStep | None:
        """What is wrong at the end of a training, also where the loss or the gradient was 0 in each of its few steps.
        Waits for the device."""
        if (bad := self.check()) is not None:
            return bad
        for name in ("zero loss", "zero gradient"):
            if self._steps and self._runs[name] == self._steps:
                return BadStep(name.split()[1], 0.0, 1, self._last_rows)
        return None

    def state_dict(self) -> GuardState:
        """What a resumed run has to know."""
        return {"runs": dict(self._runs), "skipped": list(self.skipped), "steps": self._steps}

    def load_state_dict(self, state: GuardState) -> None:
        """Continues from a `state_dict`."""
        self._runs, self.skipped = dict(state["runs"]), list(state["skipped"])
        self._steps = state["steps"]
