"""The kind of device that an operator works for, where the ways to compute differ: its tensors' own or, while a run is
planned on fake tensors (whose device is "cpu"), the plan's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_PLANNED: ContextVar[str | None] = ContextVar("_PLANNED", default=None)


@contextmanager
def planned_for(kind: str) -> Iterator[None]:
    """Within the block operators compute as on this kind of device, cpu or cuda."""
    token = _PLANNED.set(kind)
    try:
        yield
    finally:
        _PLANNED.reset(token)


def kind_of(x: Tensor) -> str:
    """cpu, cuda, ..."""
    return _PLANNED.get() or x.device.type
