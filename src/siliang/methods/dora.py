"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., 2024, arXiv:2402.09353), a variant of LoRA.

    y = m / |W + s B A| * (W + s B A) x + b_W

m is trained and starts as |W|. The norm is taken for each output and held constant in the gradient (section 4.3).
Beside other adapters, in the order in which they are active:

    y_k = m_k / |W + s_k B_k A_k| * (y_k-1 + s_k B_k A_k x)        y_0 = W x

which is also what merging one after the other makes of W.

Shapes: W (O, I), A (R, I), B (O, R), m (O,), b_W (O,) the layer's own bias; T tokens (any leading dimensions).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from siliang.methods.layer import BaseForward, Layer, Weight
from siliang.methods.low_rank import LoraSpec, LowRankLinear
from siliang.models.introspect import as_stored, features, out_by_in
from siliang.models.quantized import float_weight
from siliang.ops.lora_linear import lora_linear


class DoraLinear(LowRankLinear):
    """LoRA with a magnitude for each output: A and B, and `lora_magnitude_vector.<adapter>.weight`
    (O,), which the file calls `lora_magnitude_vector`.
    """

    def __init__(self, layer: Layer, name: str, spec: LoraSpec) -> None:
        super().__init__(layer, name, spec)
        self.add_part("lora_magnitude_vector", Weight(self._norm().to(self.A.dtype)))

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        """y + (c - 1) (y - b_W) + c s B A x with c = m / |W + s B A|: section 4.3, as a difference,
        which near c = 1 is small and is rounded as such in half precision.

        Args:
            x: (..., I).
            base_forward: Gives y, (..., O).

        Returns:
            (..., O), in the dtype of y.
        """
        y_TO = base_forward(x)
        dropout_p = self.dropout_p if self.layer.training else 0.0
        x_TI = F.dropout(x, dropout_p)
        bias_O = self.layer.base_layer.bias
        if dropout_p and base_forward.is_base_layer:  # dropout reaches the base layer's share as well
            base_TO = F.linear(x_TI, float_weight(self.layer.base_layer).to(x_TI.dtype))
        else:
            base_TO = y_TO if bias_O is None else y_TO - bias_O.to(y_TO.dtype)  # a trained bias is wider
        scale_O = self.m / self._norm()
        update_TO = lora_linear(torch.zeros_like(base_TO), x_TI, self.A, self.B, self.s)
        return y_TO + ((scale_O - 1).to(base_TO.dtype) * base_TO + scale_O.to(base_TO.dtype) * update_TO)

    def merged(self) -> dict[str, Tensor]:
        base, scale_O = self.layer.base_layer, self.m / self._norm()
        found = {"weight": as_stored(base, self._merged_OI() * scale_O.unsqueeze(1))}
        # biases that were merged before are part of y_k-1; the layer's own is not scaled
        own_O = self.layer.base_parameter("bias")
        return found if own_O is base.bias else found | {"bias": own_O + scale_O * (base.bias - own_O)}

    @property
    def m(self) -> Tensor:
        return self.module("lora_magnitude_vector", Weight).weight

    def tensors(self) -> dict[str, Tensor]:
        return {k.replace("vector.weight", "vector"): t for k, t in super().tensors().items()}

    @torch.no_grad()
    def _norm(self) -> Tensor:
        """|W + s B A| of each output, (O,), with W as it is without other adapters: merged or not, it is the same."""
        base, A = self.layer.base_layer, self.A
        if A.device.type == "meta":
            return A.new_empty(features(base)[1])
        own = self.residual if self.residual is not None else self.layer.base_parameter("weight")
        W_OI = float_weight(base) if own is base.weight and self.residual is None else out_by_in(base, own)
        return torch.linalg.norm(W_OI.to(A.dtype) + self.delta(), dim=1)
