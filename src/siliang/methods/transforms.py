"""The families of methods that map what goes into a layer, or what comes out of it.

    y = W f(x) + b        InputTransform, such as a rotation of the input
    y = g(W x + b)        OutputTransform, such as a rotation of the output

f and g are linear. Shapes: W (O, I), b (O,), x (T, I) with any leading dimensions; I in, O out.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from siliang.methods.layer import BaseForward, LayerAdapter
from siliang.models.introspect import as_stored, features
from siliang.models.quantized import float_weight


class InputTransform(LayerAdapter):
    """y = W f(x) + b. A method writes f."""

    @abstractmethod
    def transform(self, x_TI: Tensor) -> Tensor:
        """f(x), (T, I), in the dtype of x."""

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        return base_forward(self.transform(x))

    def merged(self) -> dict[str, Tensor]:
        """W F, where f(x) = F x: the rows of f(1) are the columns of F."""
        base = self.layer.base_layer
        W_OI = _wide_weight(base)
        F_T = self.transform(torch.eye(features(base)[0], dtype=W_OI.dtype, device=W_OI.device))
        return {"weight": as_stored(base, W_OI @ F_T.T)}


class OutputTransform(LayerAdapter):
    """y = g(W x + b). A method writes g."""

    @abstractmethod
    def transform(self, y_TO: Tensor) -> Tensor:
        """g(y), (T, O), in the dtype of y."""

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        return self.transform(base_forward(x))

    def merged(self) -> dict[str, Tensor]:
        """g of the columns of W, and of b."""
        base = self.layer.base_layer
        W_OI = _wide_weight(base)
        found = {"weight": as_stored(base, self.transform(W_OI.T).T.contiguous())}
        return found if base.bias is None else found | {"bias": self.transform(base.bias.to(W_OI.dtype)[None])[0]}


def _wide_weight(base: torch.nn.Module) -> Tensor:
    """The weight (O, I) in which merging computes: in fp32 where it is half, for it is rounded once, at the end."""
    weight = float_weight(base)
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
