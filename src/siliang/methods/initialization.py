"""Initialization from data: what it reads, and where what was learned for a layer waits for the next adapter on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn


class InitializationBatch(Protocol):
    """Rows that go through the model at once."""

    def forward(self) -> object:
        """Runs the model on them, without gradients."""

    def backward(self) -> object:
        """Adds the gradient of their mean loss to what requires one."""

    def rows_of(self, x: Tensor, path: str) -> Tensor:
        """The rows of a layer's input that count, (N, I): those of labelled tokens, where it is known which these are.

        Args:
            x: The input, (..., I).
            path: The layer's.
        """
        ...


class InitializationData(Protocol):
    """Rows of the training data, in an order that the run's seed decides."""

    def batches(self, *, rows: int | None = None, learned: bool = True) -> Iterable[InitializationBatch]:
        """Batches of the run's size, the same each time.

        Args:
            rows: Of how many rows in all, at most; None for all that there are.
            learned: Their `rows_of` are those of tokens that are learned; otherwise of all tokens.
        """
        ...

    def singles(self, *, tokens: int) -> Iterable[InitializationBatch]:
        """The rows one by one, without padding, until there were so many tokens."""
        ...


_WAITING: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()


def keep_initial(layer: nn.Module, initial: object) -> None:
    """Keeps what was learned for a layer of a base model."""
    _WAITING[layer] = initial


def take_initial(layer: nn.Module) -> object | None:
    """What was kept for a layer, which is given out once; None for nothing."""
    return _WAITING.pop(layer, None)


def waiting(model: nn.Module) -> dict[str, object]:
    """What waits for each layer of a base model, by path."""
    return {path: _WAITING[layer] for path, layer in model.named_modules() if layer in _WAITING}
