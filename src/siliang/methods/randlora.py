"""RandLoRA: Full-rank Parameter-efficient Fine-tuning of Large Models (Albert et al., 2025, arXiv:2502.00987).

    y = W x + s (B_1 L_1 A G_1 + ... + B_N L_N A G_N) x        s = alpha / r,  L_n = 0 at the start

L_n and G_n are diagonal and trained; B_n and A are random, frozen, and the same for all layers, with N r >= the smaller
side of a weight: the update has full rank. Where a layer has more inputs than outputs the sum is transposed. A layer
takes the first rows and columns of B and A, as many as it needs.

Shapes: W (O, I), A (r, 1, M), B (L, N, r), the diagonals of L_n in randlora_lambda (r, N), those of G_n in
randlora_gamma (N, M); L the larger of I and O, M the smaller, K = N r.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.additive import Additive
from siliang.methods.layer import Layer, new_parameter
from siliang.methods.layer_method import LayerMethod
from siliang.methods.method import SharedSpec
from siliang.methods.vera import ProjectionConfig, projection_specs
from siliang.models.introspect import features
from siliang.ops.randlora_linear import randlora_linear, scaled_bases
from siliang.types import PeftType


@dataclass(kw_only=True)
class RandLoraConfig(ProjectionConfig):
    """RandLoRA's settings, with PEFT's names and defaults.

    Attributes:
        r: Rank of a basis. Fewer mean more bases, and more numbers that are trained.
        sparse: The bases are -1 and 1 a sixth each, and 0.
        very_sparse: They are 0 but for a share of 1 / sqrt(M).
        randlora_dropout: Probability of zeroing an input of the update during training.
        randlora_alpha: Numerator of the scaling, about 20 r: with more the training may become unstable.
    """

    r: int = 32
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    randlora_alpha: float = 640

    peft_type: ClassVar[str] = PeftType.RANDLORA
    PROBABILITIES: ClassVar[tuple[str, ...]] = ("randlora_dropout",)


class RandLoraLayer(Additive):
    """RandLoRA on a linear layer: `randlora_lambda.<adapter>` (r, N) and `randlora_gamma.<adapter>` (N, M)."""

    def __init__(self, config: RandLoraConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> None:
        in_features, out_features = features(layer.base_layer)
        self.transposed = in_features > out_features
        self.small, self.large = sorted((in_features, out_features))
        self.bases = -(-self.small // config.r)
        scale = 1 / max(self.bases, self.small) if config.init_weights else 1 / self.large
        start = nn.init.zeros_ if config.init_weights else nn.init.normal_
        parts = {
            "randlora_lambda": new_parameter(layer, config.r, self.bases, start=start),
            "randlora_gamma": new_parameter(layer, self.bases, self.small, start=lambda values: values.fill_(scale)),
        }
        super().__init__(layer, name, parts)
        self.shared, self.settings, self.dropout_p = shared, {"r": config.r}, config.randlora_dropout
        self.set_scaling(config.randlora_alpha / config.r)

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """B (L, K), A (r, M), the diagonals of L_n, and those of G_n."""
        scales, gamma_NM = self.part("randlora_lambda"), self.part("randlora_gamma")
        A_R1M, B_LNR = (self.shared[f"randlora_{key}"].to(scales.device) for key in "AB")
        B_LK = B_LNR[: self.large, : self.bases].flatten(1)
        return B_LK, A_R1M[:, 0, : self.small], scales, gamma_NM

    def delta(self) -> Tensor:
        """The sum of the scaled bases, (O, I)."""
        B_LK, A_RM, scales, gamma_NM = self.factors()
        P_LM = self.s * (B_LK.to(scales.dtype) @ scaled_bases(A_RM.to(scales.dtype), scales, gamma_NM))
        return P_LM.T if self.transposed else P_LM

    def update(self, x: Tensor) -> Tensor:
        return self.s * randlora_linear(x, *self.factors(), transposed=self.transposed)


class RandLora(LayerMethod[RandLoraConfig]):
    """Scales of random bases that all layers share, as many as give an update of full rank."""

    name = "randlora"
    config = RandLoraConfig
    learning_rate = 3e-4
    learning_rate_source = Bilingual("PEFT's example for RandLoRA: 3e-4", "PEFT 的 RandLoRA 示例：3e-4")
    trains = Bilingual("the scales of random bases, for an update of full rank", "随机基的缩放，更新为满秩")

    def make(self, config: RandLoraConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> RandLoraLayer:
        return RandLoraLayer(config, layer, name, shared)

    def shared(self, config: RandLoraConfig, layers: Mapping[str, nn.Module]) -> Mapping[str, SharedSpec]:
        inputs, outputs = zip(*(features(layer) for layer in layers.values()), strict=True)
        small, large = sorted((max(inputs), max(outputs)))
        A, B = (config.r, 1, small), (large, -(-small // config.r), config.r)
        make = partial(_bases, config, A, B)
        return projection_specs(config, layers, {"randlora_A": A, "randlora_B": B}, make)

    def from_file(self, config: RandLoraConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's files hold the bases once more for each layer."""
        again = (".randlora_A", ".randlora_B")
        return {
            key: t for key, t in tensors.items() if not (key.startswith("base_model.model.") and key.endswith(again))
        }


def _bases(config: RandLoraConfig, A: tuple[int, int, int], B: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """A and B with a standard deviation of 1, as PEFT draws them: on the CPU, in bf16 but for sparse ones."""
    generator = torch.Generator().manual_seed(config.projection_prng_key)
    if config.sparse or config.very_sparse:
        edge = 1 / (2 * (math.sqrt(A[2]) if config.very_sparse else 3))
        drawn = (torch.rand(shape, generator=generator) for shape in (A, B))
        found = [(values > 1 - edge).float() - (values < edge).float() for values in drawn]
    else:
        shapes = [A, *[(B[0], 1, B[2])] * B[1]]
        drawn_A, *parts_B = (torch.empty(shape, dtype=torch.bfloat16) for shape in shapes)
        for values in (drawn_A, *parts_B):  # not by what the initializer returns: in a plan that is nothing
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        found = [drawn_A, torch.cat(parts_B, dim=1)]
    normed_A, normed_B = ((values / values.std()).float() for values in found)
    return normed_A, normed_B
