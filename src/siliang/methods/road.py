"""RoAd: 3-in-1, 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability (Liao and Monz,
2024, arXiv:2409.00119).

    y = R (W x + b)        R of 2 x 2 blocks: (u, v) -> (a u - c v, a' v + c' u)
                           a = alpha cos theta, c = alpha sin theta

An output u of the first half of a group is turned together with v, the one at its place in the second half. theta = 0
and alpha = 1 at the start, so R = 1. The variants differ in what has a theta and an alpha of its own: road_1 each pair,
road_2 each row of a block (a', c' besides a, c), road_4 each of the four numbers.

Shapes: x (T, I), y (T, O) as (T, G, 2, S / 2), theta and alpha (G, columns, rows, S / 2), each as one vector;
S = group_size, G = O / S groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.config import LayerConfig
from siliang.methods.layer import Layer, new_parameter
from siliang.methods.layer_method import LayerMethod, check_divides
from siliang.methods.transforms import OutputTransform
from siliang.models.introspect import features
from siliang.types import ConfigError, PeftType

COLUMNS_AND_ROWS = {"road_1": (1, 1), "road_2": (1, 2), "road_4": (2, 2)}


@dataclass(kw_only=True)
class RoadConfig(LayerConfig):
    """RoAd's settings, with PEFT's names and defaults.

    Attributes:
        variant: road_1, road_2 or road_4: how many numbers there are for an output.
        group_size: Outputs in a group, of which those of the first half are paired with those of the second.
        init_weights: Start from R = 1. False: from random turns, for tests.
    """

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64
    init_weights: bool = True

    peft_type: ClassVar[str] = PeftType.ROAD
    NOT_IN_PEFT: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("group_size",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size % 2:
            raise ConfigError(
                Bilingual(
                    f"group_size = {self.group_size}: must be even, because a group's halves are paired.",
                    f"group_size = {self.group_size}：须为偶数，因为组的两半要两两配对。",
                )
            )


class RoadLayer(OutputTransform):
    """RoAd on a linear layer: `road_theta.<adapter>` and `road_alpha.<adapter>`, (O / 2,), (O,) or (2 O,)."""

    def __init__(self, config: RoadConfig, layer: Layer, name: str) -> None:
        _, out_features = features(layer.base_layer)
        check_divides("group_size", config.group_size, out_features, "outputs")
        columns, rows = COLUMNS_AND_ROWS[config.variant]
        self.shape = (-1, columns, rows, config.group_size // 2)
        size = out_features // 2 * columns * rows
        start = nn.init.constant_ if config.init_weights else partial(nn.init.normal_, std=0.5)
        parts = {
            f"road_{key}": new_parameter(layer, size, start=lambda values, mean=mean: start(values, mean))
            for key, mean in (("theta", 0.0), ("alpha", 1.0))
        }
        super().__init__(layer, name, parts)

    def transform(self, y_TO: Tensor) -> Tensor:
        """R y, group by group. For the backward pass y is kept, and nothing else of its size."""
        theta, alpha = (self.part(f"road_{key}").view(self.shape) for key in ("theta", "alpha"))
        cos = (alpha[:, 0] * theta[:, 0].cos()).to(y_TO.dtype)  # (G, rows, S / 2)
        sin = (alpha[:, -1] * theta[:, -1].sin()).to(y_TO.dtype)
        u, v = y_TO.unflatten(-1, (-1, 2, self.shape[-1])).unbind(-2)  # (T, G, S / 2) each
        turned = (cos[:, 0] * u - sin[:, 0] * v, cos[:, -1] * v + sin[:, -1] * u)
        return torch.stack(turned, dim=-2).flatten(-3)


class Road(LayerMethod[RoadConfig]):
    """Turns and stretches of pairs of the outputs of linear layers."""

    name = "road"
    config = RoadConfig
    learning_rate = 1e-3
    learning_rate_source = Bilingual("PEFT's comparison on MetaMathQA: 1e-3", "PEFT 在 MetaMathQA 上的对比：1e-3")
    trains = Bilingual("rotations of pairs of the outputs of chosen linear layers", "所选线性层输出两两一组的旋转")

    def make(self, config: RoadConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> RoadLayer:
        return RoadLayer(config, layer, name)
