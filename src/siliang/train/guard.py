"""Stops a run whose loss or gradient is nan, infinite, or exactly zero: nothing is learned from there on. Or, where the
user wants it, passes over a few steps whose loss or gradient is no number, before they touch a weight.

The figures stay on the device, and are looked at when something else waits for it anyhow (a line of the log, a
checkpoint), so that a GPU is not made to wait at every step. On the CPU they are looked at every step.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PATIENCE = 25  # steps of exact zeros; or, under fp16, of infinite gradients: the loss scale halves 16 times at most


@dataclass(frozen=True)
class Trouble:
    """What went wrong, and where.

    Attributes:
        what: "loss" or "gradient".
        value: nan, inf or 0.
        step: The optimiser step in which it began, from 1.
        rows: The numbers of the examples in that step.
    """

    what: str
    value: float
    step: int
    rows: tuple[int, ...]


@dataclass
class _Seen:
    step: int
    rows: tuple[int, ...]
    loss: Tensor
    grad_norm: Tensor


class Guard:
    """Watches one training.

    Args:
        scaled: The loss is scaled for fp16: a gradient may overflow now and then, and the step is passed over.
        skips: Steps that may be passed over because their loss or gradient is no number.

    Attributes:
        passed_over: The steps that were.
    """

    def __init__(self, *, scaled: bool, skips: int = 0) -> None:
        self.passed_over: list[int] = []
        self._scaled, self._skips = scaled, skips
        self._unread: deque[_Seen] = deque()
        self._losses: list[Tensor] = []
        self._rows: list[int] = []
        self._steps, self._last_rows = 0, ()  # looked at
        self._runs = {"zero loss": 0, "zero gradient": 0, "lost gradient": 0}

    def see_batch(self, loss: Tensor, rows: list[int]) -> None:
        """One batch of a step that is not finished.

        Args:
            loss: Of the batch; any shape, on any device.
            rows: The numbers of its examples.
        """
        self._losses.append(loss.detach().float().sum())
        self._rows += rows

    def passes_over(self, step: int, grad_norm: Tensor | float) -> Trouble | None:
        """What is wrong with a step that is not to be made; None where it is made. Waits for the device."""
        if len(self.passed_over) >= self._skips:
            return None
        loss, norm = float(torch.stack(self._losses).sum()), float(grad_norm)
        if math.isfinite(loss) and (math.isfinite(norm) or self._scaled):
            return None
        what, value = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
        trouble = Trouble(what, value, step, tuple(self._rows))
        self._losses, self._rows = [], []
        self.passed_over.append(step)
        return trouble

    def state(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        return {"runs": dict(self._runs), "passed_over": list(self.passed_over), "steps": self._steps}

    def go_on(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""
        self._runs, self.passed_over = dict(state["runs"]), list(state["passed_over"])
        self._steps = state["steps"]

    def see_step(self, step: int, grad_norm: Tensor | float) -> None:
        """The step's end, before anything of it is kept."""
        if not self._losses:
            return  # it was passed over
        losses = torch.stack(self._losses)
        norm = torch.as_tensor(grad_norm, dtype=torch.float32, device=losses.device)
        self._unread.append(_Seen(step, tuple(self._rows), losses.sum(), norm))
        self._losses, self._rows = [], []

    def never_more_than_zero(self) -> Trouble | None:
        """What is wrong at the end of a training whose loss or gradient was 0 in every step; waits for the device."""
        if (trouble := self.look()) is not None:
            return trouble
        for name in ("zero loss", "zero gradient"):
            if self._steps and self._runs[name] == self._steps:
                return Trouble(name.split()[1], 0.0, 1, self._last_rows)
        return None

    def look(self) -> Trouble | None:
        """What has gone wrong since the last look; waits for the device."""
        if not self._unread:
            return None
        figures = torch.stack([torch.stack((s.loss, s.grad_norm)) for s in self._unread]).tolist()
        seen, self._unread = list(self._unread), deque()
        for s, (loss, norm) in zip(seen, figures, strict=True):
            self._steps, self._last_rows = self._steps + 1, s.rows
            if not math.isfinite(loss):
                return Trouble("loss", loss, s.step, s.rows)
            if not math.isfinite(norm) and not self._scaled:
                return Trouble("gradient", norm, s.step, s.rows)
            for name, value, now in (
                ("zero loss", loss, loss == 0),
                ("zero gradient", norm, norm == 0),
                ("lost gradient", norm, not math.isfinite(norm)),
            ):
                self._runs[name] = self._runs[name] + 1 if now else 0
                if self._runs[name] == PATIENCE:
                    return Trouble(name.split()[1], value, s.step - PATIENCE + 1, s.rows)
        return None
