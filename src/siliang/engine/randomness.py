"""Finds out whether a model draws random numbers in training: dropout, skipped layers, noise."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from siliang.engine.random_state import numpy_state
from siliang.language import Bilingual

RANDOM = Bilingual("something random", "随机的部分")


def find_randomness(
    root: nn.Module, run: Callable[[], object], device: torch.device, *, until: nn.Module | None = None
) -> tuple[str, str] | None:
    """The first random operation of a trial, and its place; None if there is none.

    This is found by running the model, not from settings: dropout, skipped layers and jitter have different names in
    each model.

    Args:
        root: The model, or the part of it, that is searched.
        run: Runs it in training mode.
        until: What comes behind this module is not searched.
    """
    before: dict[nn.Module, tuple[object, ...]] = {}
    found: list[tuple[str, str]] = []
    ended: list[tuple[object, ...]] = []  # the states behind `until`

    def end(module: nn.Module, args: object, output: object) -> None:
        ended.append(random_states(device))

    def enter(module: nn.Module, args: object) -> None:
        before[module] = random_states(device)

    def leave(path: str, module: nn.Module, args: object, output: object) -> None:
        if not found and not ended and before.get(module) != random_states(device):  # the innermost module ends first
            named = [v for n, v in vars(module).items() if ("dropout" in n or n == "p") and isinstance(v, float) and v]
            what = Bilingual(f"dropout of {max(named):g}", f" {max(named):g} 的 dropout") if named else RANDOM
            found.append((what, path or type(module).__name__))

    handles: list[RemovableHandle] = []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            first = random_states(device)
            for watch in (False, True):  # most models draw nothing, and a look at each module takes time
                for path, module in root.named_modules() if watch else ():
                    handles.append(module.register_forward_pre_hook(enter))
                    handles.append(module.register_forward_hook(partial(leave, path)))
                if until is not None:
                    handles.append(until.register_forward_hook(end))
                ended.clear()
                run()
                if (ended[-1] if ended else random_states(device)) == first:
                    break
                first = random_states(device)
            else:
                if not found:  # between its layers, such as layer skipping
                    found.append((RANDOM, type(root).__name__))
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def draws_on_fake(run: Callable[[], object]) -> bool:
    """Whether a trial on fake tensors uses random numbers; True if it does not run."""
    draws = _Draws()
    try:
        with draws:
            run()
    except Exception:  # a model may raise any exception on tensors without values
        return True
    return draws.found


class _Draws(TorchDispatchMode):
    """Detects operators that use random numbers."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.found |= "dropout_p" not in names or given.get("dropout_p", 0.0) > 0  # attention without dropout
        return func(*args, **(kwargs or {}))


def random_states(device: torch.device) -> tuple[object, ...]:
    """The states of all generators that a model may use, for comparison."""
    _, keys, place, *_ = numpy_state()
    on_card = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    torchs = torch.get_rng_state().numpy().tobytes()
    return torchs, on_card, random.getstate(), keys.tobytes(), place
