"""Whether the cost of a step grows in proportion to its tokens and to the model's layers.

    seconds = a + b n      by least squares, n tokens or layers

python -m bench.fits

LoRA r=8 on query and value of a Llama 512 wide, in fp32, rows of 64 tokens, packed and split as in a run. Memory over
the number of steps is in docs/reliability.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from bench.ranks import LENGTH, VOCABULARY, llama
from siliang import LoraConfig, get_peft_model
from siliang.data.collate import PadCollator
from siliang.engine.batches import StepCollator, most_tokens
from siliang.engine.step import Engine
from siliang.tasks import CAUSAL_LM
from siliang.types import TaskType

WIDTH = 512
ROWS, LAYERS = (8, 16, 32, 64, 128), (2, 4, 8, 16)
FIXED_ROWS, FIXED_LAYERS = 32, 4


def make_step(rows: int, layers: int) -> Callable[[], None]:
    """A full training step on random tokens, including the optimizer."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(llama(WIDTH, layers))
    model = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, target_modules=["q_proj", "v_proj"]))
    engine = Engine(model, CAUSAL_LM)
    optimizer = AdamW(p for p in model.parameters() if p.requires_grad)
    ids = torch.randint(4, VOCABULARY, (rows, LENGTH)).tolist()
    most = most_tokens(None, "cpu", torch.float32)
    collate = StepCollator(PadCollator(0), CAUSAL_LM, rows, most, packed=True)
    batches = collate([{"input_ids": row, "labels": row} for row in ids])["batches"]
    model.train()

    def step() -> None:
        engine.run(model, batches, float(rows * (LENGTH - 1)))
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(steps: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    """The median of each, in turn."""
    for step in steps:
        step()
    found: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, own in zip(steps, found, strict=True):
            start = time.perf_counter()
            step()
            own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in found]


def fit(name: str, sizes: Sequence[int], took: Sequence[float]) -> str:
    """Measured, fitted, and how far apart."""
    slope, start = np.polyfit(sizes, took, 1, w=1 / np.array(took))  # by relative error: small sizes count too
    line = start + slope * np.array(sizes)
    left = np.sum((np.array(took) - line) ** 2) / np.sum((np.array(took) - np.mean(took)) ** 2)
    lines = [f"| {name} | measured, ms | fitted, ms | off by |", "| ---: | ---: | ---: | ---: |"]
    for n, t, on_line in zip(sizes, took, line, strict=True):
        lines.append(f"| {n:,} | {1e3 * t:,.0f} | {1e3 * on_line:,.0f} | {100 * (t / on_line - 1):+.1f}% |")
    lines += ["", f"{1e3 * start:,.0f} ms + {1e3 * slope:,.3g} ms for each of the {name}, R² = {1 - left:.4f}", ""]
    return "\n".join(lines)


def main() -> None:
    """Prints both fits."""
    parser = argparse.ArgumentParser(
        "python -m bench.fits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    tokens = [n * LENGTH for n in ROWS]
    print(fit("tokens", tokens, seconds([make_step(n, FIXED_LAYERS) for n in ROWS], rounds)))
    print(fit("layers", LAYERS, seconds([make_step(FIXED_ROWS, n) for n in LAYERS], rounds)))


if __name__ == "__main__":
    main()
