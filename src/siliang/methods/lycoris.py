"""What LoHa and LoKr share: an addition to the weight with a rank, a scaling, and two kinds of dropout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from siliang.methods.additive import Additive
from siliang.methods.layer import BaseForward, Layer
from siliang.methods.layer_method import BlocksConfig, check_ranks
from siliang.models.introspect import is_convolution, is_linear


@dataclass(kw_only=True)
class LycorisConfig(BlocksConfig):
    """The settings that LoHa and LoKr share.

    Attributes:
        r: Rank.
        alpha: Numerator of the scaling alpha / r.
        rank_dropout: Probability of zeroing a row of the update during training.
        module_dropout: Probability of leaving a layer's whole update out during training.
        init_weights: The update is zero at the start. False: random, for tests.
        use_effective_conv2d: On a convolution whose window is more than one place, low-rank factors share a small core
            for the window (Proposition 3 of the FedPara paper), where otherwise the window counts as inputs.
        rank_pattern: r for layers whose name ends in, or matches, the key: the first that does, in the order given.
        alpha_pattern: alpha likewise.
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    init_weights: bool = True
    use_effective_conv2d: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("r",)
    PROBABILITIES: ClassVar[tuple[str, ...]] = ("rank_dropout", "module_dropout")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks("rank_pattern", self.rank_pattern)


def core_window(config: LycorisConfig, layer: nn.Module) -> tuple[int, ...]:
    """The window of a core (R, R, *window); () where the factors have none. PEFT gives Conv1d's a second size of 1."""
    window = tuple(layer.get_parameter("weight").shape[2:]) if is_convolution(layer) else ()
    if not config.use_effective_conv2d or math.prod(window) == 1:
        return ()
    return (*window, 1) if len(window) == 1 else window


def with_core(T: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """A^T T B at each place of the window, (O, I, *window), of T (R, R, *window), A (R, O), B (R, I)."""
    return torch.einsum("ij...,io,jk->ok...", T, A, B)


class LycorisAdapter(Additive):
    """An update of the weight with scaling s.

    Attributes:
        keeps_mean: The rows that `rank_dropout` leaves make up for those that it zeroes.
    """

    keeps_mean = True

    def __init__(
        self, config: LycorisConfig, layer: Layer, name: str, parts: Mapping[str, nn.Module | nn.Parameter]
    ) -> None:
        super().__init__(layer, name, parts)
        self.set_scaling(config.alpha / config.r)
        self.settings = {"r": config.r, "alpha": config.alpha}
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout

    def as_weight(self, delta: Tensor) -> Tensor:
        """An update (O, I) in the shape of the layer's weight, which a convolution has with its window."""
        base = self.layer.base_layer
        return delta if is_linear(base) else delta.reshape(base.weight.shape)

    @property
    def drops(self) -> bool:
        return self.layer.training and self.rank_dropout > 0.0

    def dropped_update(self, x: Tensor) -> Tensor:
        """ΔW x without some rows of ΔW, which are outputs."""
        y, window = self.update(x), self.layer.base_layer.weight.dim() - 2
        kept = (torch.rand(y.shape[-1 - window], device=y.device) > self.rank_dropout).to(y.dtype)
        return y * (kept / kept.mean() if self.keeps_mean else kept).view(-1, *[1] * window)

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        if self.module_dropout and self.layer.training and torch.rand(()) <= self.module_dropout:
            return base_forward(x)
        return super().forward(x, base_forward)
