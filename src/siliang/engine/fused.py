"""Fused modules for norms and activations that transformers computes in several steps: fewer memory accesses.

They are RMS norms and gated feed-forward layers as in Llama, and the tanh GELU of BLOOM and GPT-2. Each class is
compared with the fused form once, on small random numbers, before its modules use it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siliang.engine.patches import has_own_forward, patched
from siliang.models.introspect import is_gated, is_gelu, is_rms_norm, rms_eps
from siliang.ops.rms_norm import rms_norm
from siliang.ops.swiglu import swiglu

TRIAL_WIDTH = 8
Form = Callable[[nn.Module, Tensor], Tensor]


class FusedModules:
    """The modules of a model that have a fused form."""

    def __init__(self, model: nn.Module) -> None:
        forms = ((m, gated_form(type(m)) if is_gated(m) else fused_form(type(m))) for m in model.modules())
        self._modules = [(m, partial(form, m)) for m, form in forms if form is not None]

    def on(self) -> AbstractContextManager[None]:
        """Within the block, which must include the backward pass, the modules use their fused forms."""
        return patched((m, form) for m, form in self._modules if not has_own_forward(m))


@cache
def fused_form(kind: type[nn.Module]) -> Form | None:
    """The fused form of this class of modules; None if it has none."""
    form = _rms_norm if is_rms_norm(kind) else _gelu if is_gelu(kind) else None
    if form is None:
        return None
    # a new thread has neither autocast nor fake tensors
    with ThreadPoolExecutor(1) as alone:
        return form if alone.submit(_agrees, kind, form).result() else None


@cache
def gated_form(kind: type[nn.Module]) -> Form | None:
    """The fused form of this class of gated feed-forward layers (`is_gated`); None if it computes something else."""
    with ThreadPoolExecutor(1) as alone:
        return _gated if alone.submit(_agrees, kind, _gated).result() else None


def _rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    return rms_norm(x, cast(Tensor, module.weight), rms_eps(module))


def _gated(module: nn.Module, x: Tensor) -> Tensor:
    layer = cast(Any, module)
    y: Tensor = layer.down_proj(swiglu(layer.gate_proj(x), layer.up_proj(x)))
    return y


def _gelu(module: nn.Module, x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@torch.no_grad()
def _agrees(kind: type[nn.Module], form: Form) -> bool:
    """Compares a small module of the class with the fused form; only its name is known."""
    generator = torch.Generator().manual_seed(0)
    try:
        module = _small_gated(kind) if form is _gated else kind(TRIAL_WIDTH) if form is _rms_norm else kind()
        for p in module.parameters():
            p.copy_(torch.rand(p.shape, generator=generator) + 0.5)
        x = 3 * torch.randn(5, TRIAL_WIDTH, generator=generator)
        return torch.allclose(module(x), form(module, x), rtol=1e-5, atol=1e-6)
    except Exception:  # an unknown class may raise any exception
        return False


def _small_gated(kind: type[nn.Module]) -> nn.Module:
    """A small layer of the class, without its config: a forward that needs more than its parts fails."""
    module: Any = kind.__new__(kind)
    nn.Module.__init__(module)
    module.gate_proj, module.up_proj = (nn.Linear(TRIAL_WIDTH, 2 * TRIAL_WIDTH, bias=False) for _ in range(2))
    module.down_proj, module.act_fn = nn.Linear(2 * TRIAL_WIDTH, TRIAL_WIDTH, bias=False), nn.SiLU()
    return module
