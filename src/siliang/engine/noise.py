"""NEFTune (Jain et al. 2023, arXiv:2310.05914): uniform noise on the embeddings of the tokens, in training.

    x' = x + alpha / sqrt(n D) u,   u ~ U(-1, 1)

n is the number of tokens of the row, so padding does not change the noise. Without padding, this is the noise of
transformers' Trainer.

Shapes: S rows, W columns of the padded batch, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EmbeddingNoise:
    """Adds the noise to the output of a model's token embeddings, only within `of`."""

    def __init__(self, embeddings: nn.Module, alpha: float) -> None:
        """
        Args:
            embeddings: The module from token ids (S, W) to (S, W, D).
            alpha: As in the equation; the paper uses 5 to 15.
        """
        self._alpha = alpha
        self._lengths: tuple[int, ...] | None = None
        self._handle = embeddings.register_forward_hook(self._add)

    @contextmanager
    def of(self, lengths: tuple[int, ...]) -> Iterator[None]:
        """Within the block, noise is added to the embeddings of a batch whose rows have these lengths."""
        self._lengths = lengths
        try:
            yield
        finally:
            self._lengths = None

    def close(self) -> None:
        """Removes the hook from the model."""
        self._handle.remove()

    def _add(self, embeddings: nn.Module, args: object, x_SWD: Tensor) -> Tensor | None:
        if self._lengths is None:
            return None
        sizes = [self._alpha / math.sqrt(n * x_SWD.shape[-1]) for n in self._lengths]
        scale_S11 = torch.tensor(sizes, dtype=x_SWD.dtype).to(x_SWD.device, non_blocking=True)[:, None, None]
        return x_SWD + torch.empty_like(x_SWD).uniform_(-1, 1) * scale_S11
