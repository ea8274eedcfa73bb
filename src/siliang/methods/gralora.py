"""GraLoRA: Granular Low-Rank Adaptation (Jung et al., 2025, arXiv:2505.20355).

    y_m = (W x)_m + s (B_m1 A_1m x_1 + ... + B_mN A_Nm x_N)        s = alpha / (r + hybrid_r),  B = 0 at the start

The weight is cut into N x N blocks, and each has a low-rank update of its own, of rank r / N: as many numbers as LoRA
with r, and a rank of up to N r. With hybrid_r a LoRA of the whole weight is added.

Shapes: x_n (I / N,), y_m (O / N,), A_nm (r / N, I / N), all in gralora_A (N, I / N, r); B_mn (O / N, r / N), all in
gralora_B (N, r, O / N); I in, O out, N = gralora_k. In the code P = I / N, Q = r / N, S = O / N.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.additive import Additive
from siliang.methods.layer import Layer, Weight, kaiming, new_parameter
from siliang.methods.layer_method import BlocksConfig, LayerMethod, check_divides
from siliang.models.introspect import features
from siliang.ops.lora_linear import lora_linear
from siliang.types import ConfigError, PeftType


@dataclass(kw_only=True)
class GraloraConfig(BlocksConfig):
    """GraLoRA's settings, with PEFT's names and defaults.

    Attributes:
        r: Numbers that an input or output has in A and B together, as in LoRA: N times the rank of a block.
        hybrid_r: Rank of the LoRA that is added to the blocks; 0 for none.
        alpha: Numerator of the scaling.
        gralora_dropout: Probability of zeroing an input of the update during training.
        gralora_k: N: blocks in a row and in a column. It divides r, and the inputs and outputs of each layer.
        fan_in_fan_out: The base weight is stored (in, out). Found by itself for GPT-2's Conv1D; kept for the file.
        bias: The base biases that are trained too: "none", "all", or of the tuned layers ("gralora_only").
        init_weights: The update is zero at the start. False: random, for tests.
    """

    r: int = 32
    hybrid_r: int = 0
    alpha: float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "gralora_only"] = "none"
    init_weights: bool = True

    peft_type: ClassVar[str] = PeftType.GRALORA
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("r", "gralora_k")
    PROBABILITIES: ClassVar[tuple[str, ...]] = ("gralora_dropout",)
    NOT_IN_PEFT: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r % self.gralora_k:
            raise ConfigError(
                Bilingual(
                    f"r = {self.r} and gralora_k = {self.gralora_k}: r must be a multiple of gralora_k.",
                    f"r = {self.r}，gralora_k = {self.gralora_k}：r 须为 gralora_k 的倍数。",
                )
            )
        if not 0 <= self.hybrid_r <= self.MOST:
            raise ConfigError(
                Bilingual(
                    f"hybrid_r = {self.hybrid_r}: must be a rank, or 0 for no LoRA in addition to the blocks.",
                    f"hybrid_r = {self.hybrid_r}：须为秩，或为 0（分块之外不加 LoRA）。",
                )
            )


class GraloraLayer(Additive):
    """GraLoRA on a linear layer: `gralora_A.<adapter>` and `gralora_B.<adapter>`, and of the LoRA added to them
    `gralora_A_general.<adapter>.weight` (hybrid_r, I) and `gralora_B_general.<adapter>.weight` (O, hybrid_r).
    """

    def __init__(self, config: GraloraConfig, layer: Layer, name: str) -> None:
        N, r, hybrid_r = config.gralora_k, config.r, config.hybrid_r
        in_features, out_features = features(layer.base_layer)
        check_divides("gralora_k", N, in_features, "inputs")
        check_divides("gralora_k", N, out_features, "outputs")
        zero, P, S = config.init_weights, in_features // N, out_features // N
        parts: dict[str, nn.Module | Tensor] = {
            "gralora_A": new_parameter(layer, N, P, r, start=_kaiming_of(P)),
            "gralora_B": new_parameter(layer, N, r, S, start=nn.init.zeros_ if zero else _kaiming_of(r)),
        }
        if hybrid_r:
            parts["gralora_A_general"] = Weight(new_parameter(layer, hybrid_r, in_features, start=kaiming))
            start = nn.init.zeros_ if zero else kaiming
            parts["gralora_B_general"] = Weight(new_parameter(layer, out_features, hybrid_r, start=start))
        super().__init__(layer, name, parts)
        self.blocks, self.hybrid = N, hybrid_r > 0
        self.settings = {"r": r, "hybrid_r": hybrid_r, "alpha": config.alpha, "gralora_k": N}
        self.dropout_p = config.gralora_dropout
        self.set_scaling(config.alpha / (r + hybrid_r))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A by block, (N, P, M, Q), and s B, (M, N, Q, S)."""
        A_NPMQ = self.part("gralora_A").unflatten(-1, (self.blocks, -1))
        return A_NPMQ, self.s * self.part("gralora_B").unflatten(1, (self.blocks, -1))

    def general(self) -> tuple[Tensor, Tensor]:
        """A and B of the LoRA added to the blocks."""
        return self.module("gralora_A_general", Weight).weight, self.module("gralora_B_general", Weight).weight

    def delta(self) -> Tensor:
        """The blocks' updates in their places, (O, I)."""
        A_NPMQ, B_MNQS = self.factors()
        delta_OI = torch.einsum("mnqs,npmq->msnp", B_MNQS, A_NPMQ).flatten(2).flatten(0, 1)
        if self.hybrid:
            A_RI, B_OR = self.general()
            delta_OI = delta_OI + self.s * (B_OR @ A_RI)
        return delta_OI

    def update(self, x: Tensor) -> Tensor:
        A_NPMQ, B_MNQS = (factor.to(x.dtype) for factor in self.factors())
        inner = torch.einsum("...np,npmq->...mnq", x.unflatten(-1, (self.blocks, -1)), A_NPMQ)
        y_TO = torch.einsum("...mnq,mnqs->...ms", inner, B_MNQS).flatten(-2)
        return lora_linear(y_TO, x, *self.general(), self.s) if self.hybrid else y_TO


class Gralora(LayerMethod[GraloraConfig]):
    """Low-rank updates of the blocks of a weight."""

    name = "gralora"
    config = GraloraConfig
    learning_rate = 2e-4
    learning_rate_source = Bilingual("PEFT's comparison on MetaMathQA: 2e-4", "PEFT 在 MetaMathQA 上的对比：2e-4")
    trains = Bilingual("low-rank updates of the blocks of each weight", "每个权重的各分块的低秩更新")

    def make(self, config: GraloraConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> GraloraLayer:
        return GraloraLayer(config, layer, name)


def _kaiming_of(columns: int) -> Callable[[Tensor], object]:
    """As `kaiming` fills a factor with so many columns, which is stored the other way round here."""
    bound = 1 / math.sqrt(columns)
    return lambda values: values.uniform_(-bound, bound)
