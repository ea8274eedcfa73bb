"""Norms and activations that transformers writes out step by step, in forms that pass over memory less often.

RMS norms of Llama's kind, and the GELU by tanh, which BLOOM and GPT-2 spell out. A class of modules is tried beside the
quicker form once, on small random numbers, before its modules take that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siliang.engine.forwards import replace_forward
from siliang.ops.rms_norm import rms_norm

TRIAL_WIDTH = 8
EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
Form = Callable[[nn.Module, Tensor], Tensor]


class Quicker:
    """The modules of a model that have a quicker form."""

    def __init__(self, model: nn.Module) -> None:
        forms = ((m, quicker_form(type(m))) for m in model.modules())
        self._modules = [(m, partial(form, m)) for m, form in forms if form is not None]

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within the block, which must hold the backward pass as well, they compute so."""
        taken = [(m, form) for m, form in self._modules if "forward" not in m.__dict__]  # somebody else's stays
        undo = [replace_forward(m, form) for m, form in taken]
        try:
            yield
        finally:
            for restore in undo:
                restore()


@cache
def quicker_form(kind: type[nn.Module]) -> Form | None:
    """What modules of this class may compute in its place, with the same results; None where nothing is known."""
    form = _rms_norm if kind.__name__.endswith("RMSNorm") else _gelu if "gelu" in kind.__name__.lower() else None
    if form is None:
        return None
    with ThreadPoolExecutor(1) as alone:  # where neither autocast nor the plan's fake tensors reach
        return form if alone.submit(_agrees, kind, form).result() else None


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, _eps(module))


def _gelu(module: Any, x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _eps(module: Any) -> float:
    return next(getattr(module, name) for name in EPS_NAMES if hasattr(module, name))


@torch.no_grad()
def _agrees(kind: Any, form: Form) -> bool:
    """Tries a small module of the class, of which nothing is known but its name."""
    chance = torch.Generator().manual_seed(0)
    try:
        module = kind(TRIAL_WIDTH) if form is _rms_norm else kind()
        for p in module.parameters():
            p.copy_(torch.rand(p.shape, generator=chance) + 0.5)
        x = 3 * torch.randn(5, TRIAL_WIDTH, generator=chance)
        return torch.allclose(module(x), form(module, x), rtol=1e-5, atol=1e-6)
    except Exception:  # whatever a class of any kind raises that is made or called otherwise
        return False
