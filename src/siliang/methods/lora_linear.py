"""LoRA on a linear layer: y = W x + s B A x (+ s b), with A and B as its variants give them."""

from __future__ import annotations

from torch import Tensor

from siliang.methods.layer import BaseForward
from siliang.methods.low_rank import LowRankLinear
from siliang.ops.lora_linear import lora_linear


class LoraLinear(LowRankLinear):
    """LoRA on a linear layer. A variant with an A or B of its own writes `factors` alone."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R) of the update s B A."""
        return self.A, self.B

    def delta(self) -> Tensor:
        A_RI, B_OR = self.factors()
        return self.s * (B_OR @ A_RI)

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        """y = W x + s B A x (+ s b)"""
        return self.added(base_forward(x), x, *self.factors())

    def added(self, y: Tensor, x: Tensor, A_RI: Tensor, B_OR: Tensor) -> Tensor:
        """y + s B A x (+ s b), with dropout on x."""
        return lora_linear(
            y, x, A_RI, B_OR, self.s, bias_O=self.b, dropout_p=self.dropout_p, training=self.layer.training
        )
