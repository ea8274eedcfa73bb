"""The family of methods that add to a layer's weight: y = (W + ΔW) x + b. A method writes ΔW.

Shapes: W, ΔW (O, I), of a convolution as its weight is; x (T, I) with any leading dimensions; I in, O out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from siliang.methods.layer import BaseForward, LayerAdapter
from siliang.models.introspect import apply_weight, as_stored, is_linear, out_by_in
from siliang.models.quantized import float_weight, is_quantized
from siliang.ops.lora_linear import lora_linear
from siliang.ops.recomputed import recomputed_linear


class Additive(LayerAdapter):
    """ΔW on a layer. A method writes `delta`, and `update` where ΔW x can be had without ΔW.

    Attributes:
        dropout_p: The probability of zeroing an input of ΔW during training.
    """

    dropout_p: float = 0.0

    @abstractmethod
    def delta(self) -> Tensor:
        """ΔW, (O, I), or in the shape of a convolution's weight. In fp32 where the base weight is half."""

    def update(self, x: Tensor) -> Tensor:
        """ΔW x, (T, O), in the dtype of `x` (T, I)."""
        return self._times(x, self.delta)

    @property
    def drops(self) -> bool:
        """Whether something of ΔW is left out at random in this step."""
        return self.layer.training and self.dropout_p > 0.0

    def dropped_update(self, x: Tensor) -> Tensor:
        """`update` with the method's dropout."""
        return self.update(F.dropout(x, self.dropout_p))

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        """y + ΔW x; where ΔW is formed anyway, (W + ΔW) x in one product."""
        base, drops = self.layer.base_layer, self.drops
        if self._forms_delta and not drops and base_forward.is_base_layer and self._is_full_precision(x):
            y = self._times(x, lambda: float_weight(base) + self.delta())
            return y if base.bias is None else y + base.bias
        y = base_forward(x)
        return y + (self.dropped_update(x) if drops else self.update(x)).to(y.dtype)

    def _times(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """The base layer's output with another weight and without bias. A linear layer keeps no weight for the backward
        pass, but computes it again.
        """
        base = self.layer.base_layer
        if is_linear(base):
            return recomputed_linear(x, weight, [*self.parameters().values()])
        return apply_weight(base, x, weight().to(x.dtype))

    def merged(self) -> dict[str, Tensor]:
        """W + ΔW, in fp32 where W is half: it is rounded once, at the end."""
        base = self.layer.base_layer
        W = float_weight(base)
        return {"weight": as_stored(base, W.to(torch.promote_types(W.dtype, torch.float32)) + self.delta())}

    def own_weight(self) -> Tensor:
        """W as the base model has it, (O, I), or as a convolution has it: without the adapters that are merged."""
        base = self.layer.base_layer
        return float_weight(base) if is_quantized(base) else out_by_in(base, self.layer.base_parameter("weight"))

    @property
    def _forms_delta(self) -> bool:
        return type(self).update is Additive.update

    def _is_full_precision(self, x: Tensor) -> bool:
        """W + ΔW is as exact as W: in half precision a small ΔW would be rounded away."""
        base = self.layer.base_layer
        if not is_linear(base) or is_quantized(base) or torch.is_autocast_enabled(x.device.type):
            return False
        return x.dtype == base.weight.dtype and x.dtype in (torch.float32, torch.float64)


class Factored(Additive):
    """ΔW = B A on a linear layer, of factors that a method computes. What is saved for the backward pass is what LoRA
    saves.
    """

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R). In fp32 where the base weight is half."""

    def delta(self) -> Tensor:
        A_RI, B_OR = self.factors()
        return B_OR @ A_RI

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        y, dropout_p = base_forward(x), self.dropout_p
        return lora_linear(y, x, *self.factors(), 1.0, dropout_p=dropout_p, training=self.layer.training)
