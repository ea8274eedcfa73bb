"""VeLoRA: rank-1 projections of sub-tokens (Miles et al., 2024, arXiv:2405.17991), a variant of LoRA.

    y = W x + s B A x        in the backward pass dA is that of x^ = c (x_g . v) v, for each of the G groups of x

LoRA keeps x (T, I) for the backward pass, and VeLoRA x_g . v (T, G). The forward pass and the other gradients are
LoRA's; that of A is an approximation. v is the mean of all groups of all tokens of a batch, scaled to length 1.

Shapes: as in ops/velora_linear.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from siliang.language import Bilingual
from siliang.methods.fields import check_fields
from siliang.methods.layer import BaseForward, Layer
from siliang.methods.lora_linear import LoraLinear
from siliang.methods.low_rank import LoraSpec
from siliang.models.introspect import features
from siliang.ops.velora_linear import compressed_projection, grouped
from siliang.types import ConfigError


@dataclass
class VeloraConfig:
    """VeLoRA's settings, with PEFT's names and defaults.

    Attributes:
        num_groups: G: into how many groups the inputs of a layer are cut. More keep more of x.
        scale: c.
        init_type: v is the mean of each batch ("batch_average") or of the first ("batch_average_once"), or random.
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("num_groups", "scale"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    Bilingual(
                        f"{name} = {getattr(self, name)}: must be more than 0.",
                        f"{name} = {getattr(self, name)}：须大于 0。",
                    )
                )


class VeloraLinear(LoraLinear):
    """LoRA that keeps its input compressed: also `lora_velora_embed.<adapter>` (D,), which is v."""

    def __init__(self, layer: Layer, name: str, spec: LoraSpec, settings: VeloraConfig) -> None:
        super().__init__(layer, name, spec)
        self._settings, weight = settings, layer.base_layer.weight
        in_features = features(layer.base_layer)[0]
        if settings.num_groups > in_features:
            raise ConfigError(
                Bilingual(
                    f"velora_config: num_groups = {settings.num_groups}: must be at most the inputs of each layer, and "
                    f"one has {in_features}.",
                    f"velora_config：num_groups = {settings.num_groups}：至多为每层的输入数，"
                    f"而有一层为 {in_features}。",
                )
            )
        v = torch.zeros(-(-in_features // settings.num_groups), device=weight.device, dtype=self.A.dtype)
        if settings.init_type == "random" and v.device.type != "meta":
            v = unit(v.normal_())
        self.add_part("lora_velora_embed", v)

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        y = base_forward(x)
        if not (self.layer.training and torch.is_grad_enabled()):
            return self.added(y, x, *self.factors())
        x_TI = F.dropout(x.to(y.dtype), self.dropout_p)  # as the base layer has computed, under autocast too
        with torch.autocast(y.device.type, enabled=False):
            Ax_TR = compressed_projection(x_TI, self.A, self._v(x_TI), self._settings.num_groups, self._settings.scale)
            bias_O = None if self.b is None else self.b.to(y.dtype)
            return y + self.s * F.linear(Ax_TR, self.B.to(y.dtype), bias_O)

    @torch.no_grad()
    def _v(self, x_TI: Tensor) -> Tensor:
        """v for this batch."""
        kept = self.part("lora_velora_embed")
        if self._settings.init_type == "random":
            return kept.clone()
        v = unit(grouped(x_TI, self._settings.num_groups).flatten(0, 1).float().mean(0)).to(kept.dtype)
        if self._settings.init_type == "batch_average_once":  # zeros: no batch has been seen
            v = torch.where(kept.any(), kept, v)
        kept.copy_(v)
        return v


def unit(v: Tensor) -> Tensor:
    """v scaled to length 1; of zeros, a vector of equal numbers."""
    length = torch.linalg.vector_norm(v.float())
    return torch.where(length > 0, v / length.clamp(min=torch.finfo(torch.float32).tiny), len(v) ** -0.5).to(v.dtype)
