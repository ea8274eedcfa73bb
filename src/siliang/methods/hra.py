"""HRA: Bridging the Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation (Yuan et al.,
2024, arXiv:2405.17484).

    y = W H x + b        H = H_1 ... H_R,  H_r = 1 - 2 u_r u_r^T a reflection, the columns of U at length 1
                         H = 1 - U T U^T,  T^-1 = 1/2 + the part of U^T U above the diagonal

H turns x and leaves lengths and angles as they are. Columns of U are equal in pairs at the start, and two equal
reflections are none, so H = 1. With apply_GS the columns are made orthogonal: H = 1 - 2 Q Q^T, Q a basis of theirs.

Shapes: x (T, I), W (O, I), U (I, R), H (I, I), T (R, R); R = r.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.layer import Layer, kaiming, new_parameter
from siliang.methods.layer_method import BlocksConfig, LayerMethod, check_fits
from siliang.methods.method import Parts
from siliang.methods.transforms import InputTransform
from siliang.models.introspect import features
from siliang.ops.lora_linear import lora_linear
from siliang.types import PeftType


@dataclass(kw_only=True)
class HRAConfig(BlocksConfig):
    """HRA's settings, with PEFT's names and defaults.

    Attributes:
        r: Number of reflections. An even one starts from H = 1.
        apply_GS: Orthogonal reflections. They do not start from H = 1.
        init_weights: Columns equal in pairs at the start, where that gives H = 1. False: random ones, for tests.
        bias: The base biases that are trained too: "none", "all", or of the tuned layers ("hra_only").
    """

    r: int = 8
    apply_GS: bool = False  # noqa: N815, as PEFT has it
    init_weights: bool = True
    bias: Literal["none", "all", "hra_only"] = "none"

    peft_type: ClassVar[str] = PeftType.HRA
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("r",)

    @property
    def starts_from_the_base(self) -> bool:
        """Whether H can be 1 at the start."""
        return self.r % 2 == 0 and not self.apply_GS


class HRALayer(InputTransform):
    """HRA on a linear layer: `hra_u.<adapter>` (I, R)."""

    def __init__(self, config: HRAConfig, layer: Layer, name: str) -> None:
        in_features, _ = features(layer.base_layer)
        if config.apply_GS:
            check_fits("r", config.r, in_features, "inputs")
        if config.init_weights and config.starts_from_the_base:
            half = new_parameter(layer, in_features, config.r // 2, start=kaiming)
            U = nn.Parameter(half.detach().repeat_interleave(2, dim=1))
        else:
            U = new_parameter(layer, in_features, config.r, start=kaiming)
        super().__init__(layer, name, {"hra_u": U})
        self.orthogonal, self.settings = config.apply_GS, {"r": config.r}

    def transform(self, x_TI: Tensor) -> Tensor:
        """H x, as LoRA computes: what is added to x has rank R."""
        return lora_linear(x_TI, x_TI, *self.factors(), -1.0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """U^T (R, I) and U T (I, R), of which the product is 1 - H."""
        U_IR = self.part("hra_u")
        U_IR = U_IR.to(torch.promote_types(U_IR.dtype, torch.float32))
        with torch.autocast(U_IR.device.type, enabled=False):  # a rounded U T would not be orthogonal
            if self.orthogonal:
                Q_IR, _ = torch.linalg.qr(U_IR)
                return Q_IR.T, 2 * Q_IR
            U_IR = U_IR / U_IR.norm(dim=0)
            half = 0.5 * torch.eye(U_IR.shape[1], dtype=U_IR.dtype, device=U_IR.device)
            inverse_RR = (U_IR.T @ U_IR).triu(1) + half
            return U_IR.T, torch.linalg.solve_triangular(inverse_RR, U_IR, upper=True, left=False)


class HRA(LayerMethod[HRAConfig]):
    """Chains of reflections of the inputs of linear layers."""

    name = "hra"
    config = HRAConfig
    learning_rate = 1e-4
    learning_rate_source = Bilingual(
        "PEFT's comparison on MetaMathQA: 1e-4 with r = 32", "PEFT 在 MetaMathQA 上的对比：1e-4，r = 32"
    )
    trains = Bilingual("reflections of the inputs of chosen linear layers", "所选线性层输入的反射变换")

    def attach(self, model: nn.Module, config: HRAConfig, *, saved: Sequence[str], from_file: bool) -> Parts:
        if config.init_weights and not config.starts_from_the_base and not from_file:
            warnings.warn(
                Bilingual(
                    f"r = {config.r}, apply_GS = {config.apply_GS}: training starts away from the base model. An even "
                    "r without apply_GS starts from it.",
                    f"r = {config.r}，apply_GS = {config.apply_GS}：训练不从基座模型开始。"
                    "r 为偶数且不用 apply_GS 时才从基座模型开始。",
                ),
                stacklevel=2,
            )
        return super().attach(model, config, saved=saved, from_file=from_file)

    def make(self, config: HRAConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> HRALayer:
        return HRALayer(config, layer, name)
