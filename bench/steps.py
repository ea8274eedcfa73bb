"""Shared by the measurements of all libraries: the same start, a settled process, a clock on the steps."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.record import Job, Measurement
from siliang.memory.peak import PeakMemory

WRAPPED = (
    "base_model.model.",
    "base_model.",
    "modules_to_save.default.",
)  # what adapters put into the names of the base's own weights


def own_name(name: str) -> str:
    """A parameter's name without what wraps it: the same in every library."""
    for part in WRAPPED:
        name = name.replace(part, "")
    return name


def set_start(model: nn.Module) -> None:
    """Gives the adapter its first weights, drawn from each parameter's name: the same in every library.

    LoRA's A is normal and B zero; prompts are small and normal, their networks scaled by their inputs. What starts
    from the base's weights, or from ones, stays.
    """
    for name, p in model.named_parameters():
        if not p.requires_grad or not any(part in name for part in ("lora_", "prompt_encoder")):
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(own_name(name).encode()))
        draw = torch.randn(p.shape, generator=generator)
        scale = 0.0 if "lora_B" in name or p.ndim == 1 else p.shape[1] ** -0.5 if "mlp_head" in name else 0.02
        p.data.copy_(draw * scale)


def start_sha256(model: nn.Module) -> str:
    """A hash over what is trained, names and values."""
    digest = hashlib.sha256()
    for name, p in sorted((own_name(n), p) for n, p in model.named_parameters() if p.requires_grad):
        digest.update(name.encode())
        digest.update(p.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def settle(model: nn.Module) -> None:
    """What loading left behind is given back, and every weight is really in memory, before the peak is watched."""
    for p in model.parameters():
        p.data.sum()  # files are mapped lazily: pages that are read first in training would count as its own
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim:
            trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class StepClock:
    """Notes time and tokens where the measured steps begin and end.

    Args:
        started: When the process began, by time.time().

    Attributes:
        tokens: How many tokens, without padding, were trained up to a step that has just ended.
    """

    def __init__(self, job: Job, device: torch.device, started: float) -> None:
        self.tokens: Callable[[int], int] = lambda step: 0
        self._job, self._device, self._started = job, device, started
        self._begun = (0.0, 0.0)  # seconds since the process began, and the clock then
        self._marks: list[tuple[float, int]] = []
        self._by_step = [0]

    def begin(self) -> None:
        """What comes before the training is done."""
        self._begun = time.time() - self._started, time.perf_counter()

    def step_ended(self, step: int) -> None:
        """Step number `step`, from 1, was made."""
        at_mark = step in (self._job.warmup, self._job.warmup + self._job.steps)
        if at_mark and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if at_mark:
            self._marks.append((time.perf_counter(), self.tokens(step)))
        if self._job.purpose == "gate":  # looking at every step would make a GPU wait in timed runs
            self._by_step.append(self.tokens(step))

    def fill(self, found: Measurement, history: list[dict[str, Any]], memory: PeakMemory) -> None:
        """Writes what was seen into the record.

        Args:
            history: The lines of the log that have a loss.
        """
        (start, before), (end, after) = self._marks
        found.seconds, found.tokens = end - start, after - before
        found.before_s, found.warmup_s = self._begun[0], start - self._begun[1]
        found.loaded_bytes, found.peak_bytes = memory.start_bytes, memory.update()
        found.losses = [float(line["loss"]) for line in history if "loss" in line]
        found.grad_norms = [float(line["grad_norm"]) for line in history if "grad_norm" in line]
        found.step_tokens = [b - a for a, b in zip(self._by_step, self._by_step[1:], strict=False)]
