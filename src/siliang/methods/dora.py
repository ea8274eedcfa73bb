"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., 2024, arXiv:2402.09353), a variant of LoRA.

    y = m / |W + s B A| * (W + s B A) x + b_W

m is trained and starts as |W|. The norm is taken for each output and held constant in the gradient (section 4.3).
With other adapters, in the order in which they are active:

    y_k = m_k / |W + s_k B_k A_k| * (y_k-1 + s_k B_k A_k x)        y_0 = W x

which is also what merging one after the other makes of W. The outputs of a convolution are its channels, and those of
an embedding its columns.

Shapes: W (O, I), A (R, I), B (O, R), m (O,), b_W (O,) the layer's own bias; T tokens (any leading dimensions). A
convolution's: as in lora_conv.py, m (1, O, 1 ...). An embedding's: as in lora_embedding.py, m (D,).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from siliang.language import Bilingual
from siliang.methods.layer import BaseForward, Layer, Weight
from siliang.methods.lora_conv import LoraConv
from siliang.methods.lora_embedding import LoraEmbedding
from siliang.methods.low_rank import FactorModules, LoraSpec, LowRank, LowRankLinear
from siliang.models.introspect import apply_weight, as_stored, out_by_in
from siliang.models.quantized import float_weight
from siliang.types import ConfigError

MAGNITUDE = "lora_magnitude_vector"


class Dora(FactorModules):
    """LoRA with a magnitude for each output: A and B, and `lora_magnitude_vector.<adapter>.weight`
    (O,), which the file calls `lora_magnitude_vector`.
    """

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        return dora(self, x, base_forward)

    def merged(self) -> dict[str, Tensor]:
        return merged_dora(self)

    def tensors(self) -> dict[str, Tensor]:
        return as_in_files(super().tensors())


class DoraLinear(Dora, LowRankLinear):
    """On a linear layer."""

    def __init__(self, layer: Layer, name: str, spec: LoraSpec) -> None:
        super().__init__(layer, name, spec)
        add_magnitude(self, on=spec.norms_on)


class DoraConv(Dora, LoraConv):
    """On a convolution."""

    def __init__(self, layer: Layer, name: str, spec: LoraSpec) -> None:
        if layer.base_layer.groups > 1:
            raise ConfigError(
                Bilingual(
                    "use_dora does not work on a convolution in groups, whose weight has no sum with B A: leave it out "
                    "of target_modules.",
                    "use_dora 不能用于分组卷积，它的权重不能与 B A 相加：请从 target_modules 中去掉它。",
                )
            )
        super().__init__(layer, name, spec)
        add_magnitude(self, 1, -1, *[1] * (self.A.dim() - 2))


class DoraEmbedding(LoraEmbedding):
    """On an embedding, which has no bias and no dropout."""

    def __init__(self, layer: Layer, name: str, spec: LoraSpec) -> None:
        super().__init__(layer, name, spec)
        add_magnitude(self)

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        """c (y + s (A[:, x])^T B^T)"""
        y, scale_D = base_forward(x), scale_of(self)
        return y + (scale_D - 1).to(y.dtype) * y + (scale_D * self.update(x)).to(y.dtype)

    def merged(self) -> dict[str, Tensor]:
        return {"weight": super().merged()["weight"] * scale_of(self)}

    def tensors(self) -> dict[str, Tensor]:
        return as_in_files(super().tensors())


DORA = (DoraLinear, DoraConv, DoraEmbedding)


def dora(adapter: FactorModules, x: Tensor, base_forward: BaseForward) -> Tensor:
    """y + (c - 1) (y - b_W) + c s B A x with c = m / |W + s B A|: section 4.3, as a difference,
    which near c = 1 is small and is rounded as such in half precision.

    Args:
        x: (..., I).
        base_forward: Gives y, (..., O).

    Returns:
        (..., O), in the dtype of y.
    """
    y, base = base_forward(x), adapter.layer.base_layer
    dropout_p = adapter.dropout_p if adapter.layer.training else 0.0
    x = F.dropout(x, dropout_p)
    if dropout_p and base_forward.is_base_layer:  # dropout reaches the base layer's share as well
        of_base = apply_weight(base, x, float_weight(base).to(x.dtype))
    elif base.bias is None:
        of_base = y
    else:
        of_base = y - adapter.per_output(base.bias).to(y.dtype)  # a trained bias is wider
    scale = adapter.per_output(scale_of(adapter))
    return y + ((scale - 1).to(of_base.dtype) * of_base + scale.to(of_base.dtype) * adapter.update(x, of_base))


@torch.no_grad()
def norm_of(adapter: LowRank, *, on: torch.device | None = None) -> Tensor:
    """|W + s B A| of each output, (O,), with W as it is without other adapters: merged or not, it is the same.

    Args:
        on: Where it is computed, of a linear layer; None for where the layer is.
    """
    base, A = adapter.layer.base_layer, adapter.A
    if A.device.type == "meta":
        return A.new_empty(len(adapter.B))
    own = adapter.residual if adapter.residual is not None else adapter.layer.base_parameter("weight")
    W = float_weight(base) if own is base.weight and adapter.residual is None else out_by_in(base, own)
    W = W.T if isinstance(adapter, LoraEmbedding) else W
    update = adapter.delta() if on is None else adapter.s * (adapter.B.to(on) @ A.to(on))
    return torch.linalg.norm((W.to(update) + update).flatten(1), dim=1).to(A.device)


def scale_of(adapter: LowRank) -> Tensor:
    """c = m / |W + s B A|, (O,)."""
    return adapter.module(MAGNITUDE, Weight).weight.flatten() / norm_of(adapter)


def merged_dora(adapter: FactorModules) -> dict[str, Tensor]:
    """c (W + s B A)."""
    base, scale_O, W = adapter.layer.base_layer, scale_of(adapter), adapter.sum()
    found = {"weight": as_stored(base, W * scale_O.view(-1, *[1] * (W.dim() - 1)))}
    # biases that were merged before are part of y_k-1; the layer's own is not scaled
    own_O = adapter.layer.base_parameter("bias")
    return found if own_O is base.bias else found | {"bias": own_O + scale_O * (base.bias - own_O)}


def add_magnitude(adapter: LowRank, *shape: int, on: torch.device | None = None) -> None:
    """Registers m, which starts as |W + s B A|, in this shape."""
    adapter.add_part(MAGNITUDE, Weight(norm_of(adapter, on=on).to(adapter.A.dtype).view(*shape or (-1,))))


def as_in_files(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors, by PEFT's names in files."""
    return {key.replace("vector.weight", "vector"): t for key, t in tensors.items()}
