"""Which kind of device an operator works on, where the ways to compute differ: the tensors' own or, on paper, the one
that is planned for, while the tensors themselves are fake and say "cpu"."""

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
