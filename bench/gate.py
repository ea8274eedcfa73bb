"""Checks that two libraries trained the same: same start, same data in the same order, same losses."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench.record import NAMES, Measurement

TOLERANCE = 0.01


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison.

    Attributes:
        difference: The largest of a step's losses, relative to the peer's.
        problems: What differs; nothing if they trained the same.
    """

    difference: float
    problems: tuple[str, ...]

    def __str__(self) -> str:
        return "passed" if not self.problems else "FAILED: " + "; ".join(self.problems)


def compare(ours: Measurement, peer: Measurement) -> Verdict:
    """Compares our gate run with a peer's, step by step."""
    if failed := [m for m in (ours, peer) if m.error]:
        return Verdict(math.nan, tuple(f"{NAMES[m.job.library]} gave no result: {m.error}" for m in failed))
    problems: list[str] = []
    if ours.trained != peer.trained:
        problems.append(f"{ours.trained:,} parameters are trained by us, {peer.trained:,} by the peer")
    elif ours.start_sha256 != peer.start_sha256:
        problems.append("the weights differ before the first step")
    if ours.step_tokens != peer.step_tokens:
        pairs = enumerate(zip(ours.step_tokens, peer.step_tokens, strict=False), start=1)
        first = next((step for step, (a, b) in pairs if a != b), min(len(ours.step_tokens), len(peer.step_tokens)) + 1)
        problems.append(f"the data order differs from step {first} on")
    steps = ours.job.warmup + ours.job.steps
    for m in (ours, peer):
        if len(m.losses) != steps or len(m.grad_norms) != steps:
            problems.append(f"{NAMES[m.job.library]} logged {len(m.losses)} losses in {steps} steps")
        elif bad := next((i for i, n in enumerate(m.grad_norms, start=1) if not 0 < n < math.inf), None):
            problems.append(f"the gradient norm of {NAMES[m.job.library]} is {m.grad_norms[bad - 1]} in step {bad}")
    differences = [abs(a - b) / abs(b) for a, b in zip(ours.losses, peer.losses, strict=False)]
    differences = [math.inf if math.isnan(d) else d for d in differences]  # nan is larger than nothing
    largest = max(differences, default=math.inf)
    if largest > TOLERANCE:
        step = differences.index(largest) + 1 if differences else 0
        problems.append(f"the losses differ by {largest:.2%} in step {step}, allowed is {TOLERANCE:.0%}")
    return Verdict(largest, tuple(problems))
