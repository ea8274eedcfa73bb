"""KaSA: Knowledge-aware Singular-value Adaptation (Wang et al., 2024, arXiv:2412.06071), a variant of LoRA.

    y = W' x + s B (E * A) x        W' = W without its R smallest singular values,  B = 0: at the start y = W' x

E are singular values that are learned, and start at random. Two terms of the loss (eqs. 9 to 12), summed over the
layers, keep them small, and A and B near to orthogonal:

    beta sum(E^2) + gamma (||A A^T - 1|| + ||B^T B - 1||)        (Frobenius)

PEFT writes W' over W and leaves the terms to the user's own loop. Here both are kept, and the terms are added.

Shapes: W, W' (O, I), A (R, I), E (R,), B (O, R); I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.fields import check_fields
from siliang.methods.layer import Layer
from siliang.methods.lora_linear import LoraLinear
from siliang.methods.low_rank import LoraSpec
from siliang.models.introspect import as_stored, features, out_by_in
from siliang.types import ConfigError


@dataclass
class KasaConfig:
    """KaSA's settings, with PEFT's names and defaults.

    Attributes:
        beta: Weight of the term that keeps the singular values E small.
        gamma: Weight of the term that keeps A and B orthogonal.
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("beta", "gamma"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    Bilingual(
                        f"{name} = {getattr(self, name)}: must be at least 0.",
                        f"{name} = {getattr(self, name)}：至少为 0。",
                    )
                )


NOT_QUANTIZED = Bilingual(
    "kasa_config changes the base weight: the base model must be in 16 or 32 bits, not quantized.",
    "kasa_config 会改动基座权重：基座模型须为 16 位或 32 位，不能是量化模型。",
)


class KasaLinear(LoraLinear):
    """LoRA with E between A and B: `lora_diag.<adapter>` (R,), on the base weight W'."""

    def __init__(self, layer: Layer, name: str, spec: LoraSpec, settings: KasaConfig) -> None:
        super().__init__(layer, name, spec)
        self._beta, self._gamma = settings.beta, settings.gamma
        self.add_part("lora_diag", nn.Parameter(torch.randn_like(self.A[:, 0])))
        W = layer.base_parameter("weight")
        most = min(features(layer.base_layer))
        if spec.r >= most:
            raise ConfigError(
                Bilingual(
                    f"kasa_config: r = {spec.r}, and a layer has {most} rows or columns: W would lose all its singular "
                    "values. Choose a smaller r.",
                    f"kasa_config：r = {spec.r}，而有一层只有 {most} 行或列：W 将失去所有奇异值。请减小 r。",
                )
            )
        if not W.is_floating_point():
            raise ConfigError(NOT_QUANTIZED)
        if W.device.type != "meta":
            self._keep_residual(as_stored(layer.base_layer, _without_smallest(out_by_in(layer.base_layer, W), spec.r)))

    @property
    def E(self) -> Tensor:
        return self.part("lora_diag")

    def factors(self) -> tuple[Tensor, Tensor]:
        """E * A, and B."""
        return self.E[:, None] * self.A, self.B

    def loss_term(self) -> Tensor:
        """The layer's two terms of the loss, () in fp32."""
        A_RI, B_OR, E_R = self.A.float(), self.B.float(), self.E.float()
        one = torch.eye(len(E_R), device=E_R.device)
        apart = torch.linalg.norm(A_RI @ A_RI.T - one) + torch.linalg.norm(B_OR.T @ B_OR - one)
        return self._beta * E_R.square().sum() + self._gamma * apart


def kasa_loss(layers: Iterable[object]) -> Tensor:
    """The terms of the loss of an adapter's layers, summed."""
    terms = [layer.loss_term() for layer in layers if isinstance(layer, KasaLinear)]
    return sum(terms[1:], terms[0])


@torch.no_grad()
def _without_smallest(W_OI: Tensor, r: int) -> Tensor:
    """W without its r smallest singular values, in fp32."""
    U, S, Vh = torch.linalg.svd(W_OI.detach().float(), full_matrices=False)
    kept = len(S) - r
    return (U[:, :kept] * S[:kept]) @ Vh[:kept]
