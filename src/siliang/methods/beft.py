"""BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes (Huang et al., 2025, arXiv:2509.15974).

    y = W x + b + c

c is a bias that is added to the layer's own one, or to none; of the value projections where no others are
named. c = 0 at the start, so y is the base layer's exactly.

Shapes: x (T, I), y (T, O), b (O,), c (1, O).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.config import LayerConfig
from siliang.methods.layer import BaseForward, Layer, LayerAdapter, new_parameter
from siliang.methods.layer_method import LayerMethod
from siliang.methods.targets import BEFT_TARGETS
from siliang.models.introspect import features
from siliang.types import MergeError, PeftType


@dataclass(kw_only=True)
class BeftConfig(LayerConfig):
    """BEFT's settings, with PEFT's names and defaults.

    Attributes:
        init_weights: Start from c = 0. False: from random numbers, for tests.
    """

    init_weights: bool = True

    peft_type: ClassVar[str] = PeftType.BEFT
    NOT_IN_PEFT: ClassVar[tuple[str, ...]] = ("exclude_modules",)


class BeftLayer(LayerAdapter):
    """BEFT on a linear layer: `beft_bias.<adapter>` (1, O)."""

    def __init__(self, config: BeftConfig, layer: Layer, name: str) -> None:
        _, out_features = features(layer.base_layer)
        start = nn.init.zeros_ if config.init_weights else nn.init.normal_
        super().__init__(layer, name, {"beft_bias": new_parameter(layer, 1, out_features, start=start)})

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        y = base_forward(x)
        return y + self.part("beft_bias")[0].to(y.dtype)

    def check_merge(self) -> None:
        if self.layer.base_layer.bias is None:
            raise MergeError(
                Bilingual(
                    "BEFT's bias cannot be merged: the base model's layer has none to add it to. Keep the adapter.",
                    "BEFT 的偏置无法合并：基座模型的该层没有可相加的偏置。请保留适配器。",
                )
            )

    def delta_weight(self) -> Tensor:
        return torch.zeros_like(self.layer.base_layer.weight)

    def merged(self) -> dict[str, Tensor]:
        return {"bias": self.layer.base_layer.bias + self.part("beft_bias")[0]}


class Beft(LayerMethod[BeftConfig]):
    """A bias added to each of the chosen linear layers."""

    name = "beft"
    config = BeftConfig
    learning_rate = 1e-2
    learning_rate_source = Bilingual(
        "measured: 70% on SST-2 after 100 steps with 9e-3, 76% with 2.7e-2, 54% with 1e-3",
        "实测：SST-2 训练 100 步，用 9e-3 得 70%，用 2.7e-2 得 76%，用 1e-3 得 54%",
    )
    trains = Bilingual("biases of the value projections", "值投影的偏置")
    default_targets = BEFT_TARGETS

    def make(self, config: BeftConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> BeftLayer:
        return BeftLayer(config, layer, name)
