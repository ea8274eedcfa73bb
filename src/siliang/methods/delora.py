"""DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation (Bini et al., 2025, arXiv:2503.18225).

    y = W x + B diag(c) A (n * x)        c_r = (lambda / R) / (|A_r| |B_r|),  n the norms of W's columns

Each of the R products B_r A_r^T has norm 1, so that |ΔW| <= lambda |W|. B = 0 at the start.

Shapes: W (O, I), A (R, I), B (O, R), n (I,), lambda (1,); A_r a row of A, B_r a column of B; I in, O out, R = r.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.additive import Factored
from siliang.methods.layer import Layer, kaiming, new_parameter, trained_dtype
from siliang.methods.layer_method import BlocksConfig, LayerMethod, check_ranks
from siliang.models.introspect import features
from siliang.models.quantized import float_weight
from siliang.types import PeftType

LEAST_NORM = 1e-4  # that a factor is divided by: B's is 0 at the start


@dataclass(kw_only=True)
class DeloraConfig(BlocksConfig):
    """DeLoRA's settings, with PEFT's names and defaults.

    Attributes:
        r: Rank.
        delora_lambda: What lambda, the bound of the update, is at the start. It is trained too.
        module_dropout: Probability of zeroing an input of A during training.
        bias: The base biases that are trained too: "none", "all", or of the tuned layers ("delora_only").
        init_weights: The update is zero at the start. False: random, for tests.
        rank_pattern: r for layers whose name ends in, or matches, the key: the first that does, in the order given.
        lambda_pattern: delora_lambda likewise.
    """

    r: int = 8
    delora_lambda: float = 15
    module_dropout: float = 0.0
    bias: Literal["none", "all", "delora_only"] = "none"
    init_weights: bool = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    lambda_pattern: dict[str, float] = field(default_factory=dict)

    peft_type: ClassVar[str] = PeftType.DELORA
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("r",)
    PROBABILITIES: ClassVar[tuple[str, ...]] = ("module_dropout",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks("rank_pattern", self.rank_pattern)


class DeloraLayer(Factored):
    """DeLoRA on a linear layer: `delora_A.<adapter>` (R, I), `delora_B` (O, R), `delora_lambda` (1,), and the buffer
    `delora_w_norm` (I,), which the file holds.
    """

    def __init__(self, config: DeloraConfig, layer: Layer, name: str) -> None:
        base = layer.base_layer
        in_features, out_features = features(base)
        parts: dict[str, nn.Module | Tensor] = {
            "delora_A": new_parameter(layer, config.r, in_features, start=kaiming),
            "delora_B": new_parameter(
                layer, out_features, config.r, start=nn.init.zeros_ if config.init_weights else kaiming
            ),
            "delora_lambda": new_parameter(layer, 1, start=lambda values: values.fill_(config.delora_lambda)),
        }
        if base.weight.device.type == "meta":
            norms_I = torch.empty(in_features, device="meta")
        else:
            norms_I = float_weight(base).detach().norm(dim=0, dtype=trained_dtype(base.weight))
        super().__init__(layer, name, parts | {"delora_w_norm": norms_I})
        self.settings, self.dropout_p = {"r": config.r}, config.module_dropout

    def factors(self) -> tuple[Tensor, Tensor]:
        """A with the norms of W in its columns, and B with c in its columns."""
        A_RI, B_OR, bound = (self.part(f"delora_{key}") for key in ("A", "B", "lambda"))
        norms_R = A_RI.norm(dim=1).clamp(min=LEAST_NORM) * B_OR.norm(dim=0).clamp(min=LEAST_NORM)
        return A_RI * self.part("delora_w_norm").to(A_RI.dtype), B_OR * (bound / len(A_RI) / norms_R)


class Delora(LayerMethod[DeloraConfig]):
    """Low-rank updates of which strength and direction are trained apart."""

    name = "delora"
    config = DeloraConfig
    learning_rate = 3e-3
    learning_rate_source = Bilingual("PEFT's example for DeLoRA: 3e-3", "PEFT 的 DeLoRA 示例：3e-3")
    trains = Bilingual("low-rank updates, strength and direction apart", "低秩更新，强度与方向分开")
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "lambda_pattern": "delora_lambda"}

    def make(self, config: DeloraConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> DeloraLayer:
        return DeloraLayer(config, layer, name)
