"""Losses that are not finite, and steps that do not fit the memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from faults.runs import Place, Seen, damaged_parts, outcome, run
from siliang.config import RunConfig
from siliang.engine.batches import Batch
from siliang.engine.step import Engine
from siliang.records import Record


def _config(place: Place, output: Path, method: str = "lora", **train_settings: Any) -> RunConfig:
    """One batch per step, so that batches can be counted."""
    return place.config(output, method, batch_size=4, gradient_accumulation=1, **train_settings)


def losses_times(factor: float, steps: range) -> None:
    """Multiplies the loss of these steps from now on in this process."""
    before, seen = Engine.loss, 0

    @contextmanager
    def loss(self: Engine, model: Any, batch: Batch) -> Iterator[torch.Tensor]:
        nonlocal seen
        with before(self, model, batch) as right:
            seen += torch.is_grad_enabled()
            yield right * factor if torch.is_grad_enabled() and seen in steps else right

    Engine.loss = loss  # type: ignore[method-assign]


def no_memory_for(tokens: int, rows: int = 0) -> None:
    """From now on in this process, a batch of more tokens (and rows) than these does not fit, unless all recompute."""
    before = Engine.loss

    def loss(self: Engine, model: Any, batch: Batch) -> Any:
        full = self.recompute.recomputed < len(self.recompute.layers) or not self.recompute.layers
        if torch.is_grad_enabled() and full and batch.tokens > tokens and len(batch.lengths) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return before(self, model, batch)

    Engine.loss = loss  # type: ignore[method-assign]


def try_numbers(place: Place, folder: Path) -> Seen:
    """Tries each case once."""
    seen = Seen()
    assert run(_config(place, folder / "peace")).code == 0
    wanted = outcome(folder / "peace")
    nan, inf = float("nan"), float("inf")
    for name, factor in (("nan", nan), ("inf", inf)):
        ending = run(_config(place, folder / name), hook=partial(losses_times, factor, range(8, 9)))
        message = f"Step 8: the loss is {name}, in a batch of {place.data}:"
        kept = "checkpoint-6 is kept" in ending.output
        seen.see(name, ending.code == 2 and message in ending.output and kept, ending.output[-400:])
        seen.see(f"{name}: what was saved", not damaged_parts(folder / name), damaged_parts(folder / name))
        again = run(_config(place, folder / name), resume=True)
        seen.see(f"{name}: going on", again.code == 0 and outcome(folder / name) == wanted, again.output[-400:])
    ending = run(_config(place, folder / "zero"), hook=partial(losses_times, 0.0, range(5, 99)))
    message = "Step 5: the loss is 0 in 25 steps one after the other, in a batch of"
    seen.see("exactly 0", ending.code == 2 and message in ending.output, ending.output[-400:])
    _skip(seen, place, folder, partial(losses_times, nan, range(8, 11)))
    _memory(seen, place, folder, wanted)
    return seen


def _skip(seen: Seen, place: Place, folder: Path, hook: Callable[[], None]) -> None:
    ending = run(_config(place, folder / "skip", on_nan="skip 3"), hook=hook)
    record = Record.read(folder / "skip")
    finite = all(s.loss is None or s.loss == s.loss for s in record.steps)
    seen.see("skip 3", ending.code == 0 and record.passed_over == [8, 9, 10] and finite, ending.output[-400:])
    ending = run(_config(place, folder / "skip-2", on_nan="skip 2"), hook=hook)
    seen.see("skip 2 of 3", ending.code == 2 and "Step 10: the loss is nan" in ending.output, ending.output[-400:])


def _memory(seen: Seen, place: Place, folder: Path, wanted: dict[str, Any]) -> None:
    ending = run(_config(place, folder / "memory"), hook=partial(no_memory_for, 20))
    advised = "does not fit the memory of this cpu" in ending.output and "train.fit=true" in ending.output
    seen.see("out of memory", ending.code == 2 and advised, ending.output[-400:])
    # dropout of each batch is drawn apart, so that only a run without it is the same when it is split otherwise
    plain = folder / "plain"
    shutil.copytree(place.model, plain)
    config = plain / "config.json"
    config.write_text(config.read_text().replace('"attention_dropout": 0.1', '"attention_dropout": 0.0'))
    place = Place(plain, place.data)
    assert run(_config(place, folder / "roomy", "ia3")).code == 0
    wanted = outcome(folder / "roomy")
    for name, hook, words in (
        ("split", partial(no_memory_for, 20), "from now on, up to"),
        ("recompute", partial(no_memory_for, 2), "every layer recomputes"),
    ):
        ending = run(_config(place, folder / name, "ia3", fit=True), hook=hook)
        right = ending.code == 0 and words in ending.output
        right = right and _close(outcome(folder / name)["log"], wanted["log"])
        seen.see(f"out of memory, fit: {name}", right, ending.output[-600:])


def _close(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    pairs = [(x["loss"], y["loss"]) for x, y in zip(a, b, strict=True) if x["loss"] is not None]
    return bool(pairs) and all(abs(x - y) < 1e-4 * abs(y) for x, y in pairs)
