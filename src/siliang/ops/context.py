"""What torch.autograd gives the functions here as `ctx`: torch's own stubs lack what a backward pass reads of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Context(Protocol):
    """Where a forward pass leaves tensors for the backward pass."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keeps tensors, to be read from `saved_tensors`."""


class ScaledContext(Context, Protocol):
    """Of a function with a scaling."""

    s: float


class LoraContext(ScaledContext, Protocol):
    """Of `lora_linear`: also the probability of dropout, and the dtypes of the bias and of A and B."""

    p: float
    bias: torch.dtype | None
    factors: tuple[torch.dtype, torch.dtype]


class DtypeContext(Context, Protocol):
    """Of a function whose gradient is kept in another dtype than its input has."""

    dtype: torch.dtype


class RowsContext(Context, Protocol):
    """Of a function that takes some rows of a tensor: how many there are."""

    rows: int


class RecomputedContext(Context, Protocol):
    """Of `recomputed_linear`: what gives the weight, and its parameters."""

    weight: Callable[[], Tensor]
    parameters: tuple[Tensor, ...]


class TransposedContext(Context, Protocol):
    """Of a function that multiplies with a matrix or its transpose."""

    transposed: bool


class ProjectedContext(Context, Protocol):
    """Of a parameter whose gradient is projected: on the directions that are outside of those saved, or on these."""

    outside: bool


class CompressedContext(ScaledContext, Protocol):
    """Of `compressed_projection`: also the shape of its input."""

    shape: torch.Size
