"""Another forward for a module, for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Undo = Callable[[], None]


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Undo:
    """Gives `module` this forward; what comes back restores the one that was there.

    A forward of the instance's own, as accelerate and others set it, is put back; else the class's is behind it again.
    """
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]

    def undo() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = own  # type: ignore[method-assign]

    return undo
