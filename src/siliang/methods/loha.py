"""LoHa: FedPara, Low-Rank Hadamard Product for Communication-Efficient Federated Learning (Hyeon-Woo et al., 2022,
arXiv:2108.06098).

    y = W x + s (A1 B1 * A2 B2) x        s = alpha / r,  B2 = 0: at the start y = W x exactly

The elementwise product of two matrices of rank R has rank up to R squared. On a convolution with use_effective_conv2d
Ai^T Ti Bi at each place of the window replaces Ai Bi.

Shapes: W (O, I), A1, A2 (O, R), B1, B2 (R, I); I in, O out, R = r. With cores: T1, T2 (R, R, *window), A1, A2 (R, O).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.layer import Layer, kaiming, new_parameter
from siliang.methods.layer_method import LayerMethod
from siliang.methods.lycoris import LycorisAdapter, LycorisConfig, core_window, with_core
from siliang.models.introspect import flat_features, is_convolution, is_linear
from siliang.ops.hadamard import low_rank_hadamard
from siliang.types import PeftType


@dataclass(kw_only=True)
class LoHaConfig(LycorisConfig):
    """LoHa's settings, with PEFT's names and defaults."""

    peft_type: ClassVar[str] = PeftType.LOHA


class LoHaLayer(LycorisAdapter):
    """LoHa on a layer: `hada_w1_a.<adapter>` (O, R), `hada_w1_b` (R, I), and `hada_w2_a`, `hada_w2_b` likewise;
    with cores `hada_t1`, `hada_t2` too.
    """

    def __init__(self, config: LoHaConfig, layer: Layer, name: str) -> None:
        parts: dict[str, nn.Module | nn.Parameter] = {}
        self.window = core_window(config, layer.base_layer)
        if self.window:
            out_features, in_features = layer.base_layer.weight.shape[:2]
            shapes = {"a": (config.r, out_features), "b": (config.r, in_features)}
            for key in ("t1", "t2"):
                parts[f"hada_{key}"] = new_parameter(layer, config.r, config.r, *self.window, start=kaiming)
        else:
            in_features, out_features = flat_features(layer.base_layer)
            shapes = {"a": (out_features, config.r), "b": (config.r, in_features)}
        for key in ("w1_a", "w1_b", "w2_a", "w2_b"):
            start = nn.init.zeros_ if key == "w2_b" and config.init_weights else kaiming
            parts[f"hada_{key}"] = new_parameter(layer, *shapes[key[-1]], start=start)
        super().__init__(config, layer, name, parts)

    def delta(self) -> Tensor:
        """s (A1 B1 * A2 B2), in the shape of the layer's weight."""
        A1, B1, A2, B2 = (self.part(f"hada_{key}") for key in ("w1_a", "w1_b", "w2_a", "w2_b"))
        if self.window:
            T1, T2 = self.part("hada_t1"), self.part("hada_t2")
            return self.as_weight(self.s * with_core(T1, A1, B1) * with_core(T2, A2, B2))
        return self.as_weight(low_rank_hadamard(A1, B1, A2, B2, self.s))


class LoHa(LayerMethod[LoHaConfig]):
    """Elementwise products of two low-rank updates."""

    name = "loha"
    config = LoHaConfig
    learning_rate = 3e-3
    learning_rate_source = Bilingual(
        "measured: 75% on SST-2 after 100 steps with 4.5e-3, 80% with 1.3e-2, 54% with 1.5e-3",
        "实测：SST-2 训练 100 步，用 4.5e-3 得 75%，用 1.3e-2 得 80%，用 1.5e-3 得 54%",
    )
    trains = Bilingual("elementwise products of two low-rank updates", "两个低秩更新的逐元素乘积")
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    def supports(self, layer: nn.Module) -> bool:
        return is_linear(layer) or is_convolution(layer)

    def make(self, config: LoHaConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> LoHaLayer:
        return LoHaLayer(config, layer, name)
