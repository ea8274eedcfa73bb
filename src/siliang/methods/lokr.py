"""LoKr: Low-Rank Kronecker product, of LyCORIS (Yeh et al., 2023, arXiv:2309.14859).

    y = W x + s (C ⊗ D) x        s = alpha / r,  D = A B where its rank is low, C = 0: at the start y = W x exactly

(C ⊗ D) x is C X D^T for x as a matrix X, so that no matrix of the size of W is formed on a linear layer.

Shapes: W (O, I), C (E, F), D (G, H), A (G, R), B (R, H); I = F H in, O = E G out, R = r. On a convolution H counts the
places of the window too; with use_effective_conv2d D is A^T T B at each of them: T (R, R, *window), A (R, G).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.layer import Layer, kaiming, new_parameter
from siliang.methods.layer_method import LayerMethod
from siliang.methods.lycoris import LycorisAdapter, LycorisConfig, core_window, with_core
from siliang.models.introspect import features, is_convolution, is_linear
from siliang.types import ConfigError, PeftType


@dataclass(kw_only=True)
class LoKrConfig(LycorisConfig):
    """LoKr's settings, with PEFT's names and defaults; those that LoHa has are described there.

    Attributes:
        rank_dropout_scale: The rows that rank_dropout leaves grow, so that their mean stays.
        decompose_both: C has a low rank too.
        decompose_factor: The most rows and columns of C, taken exactly where it divides; -1: as near to D's as can be.
        init_weights: True: C zero, D random. "lycoris": the other way round. False: both random, for tests.
    """

    rank_dropout_scale: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    init_weights: bool | Literal["lycoris"] = True  # type: ignore[assignment]

    peft_type: ClassVar[str] = PeftType.LOKR

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise ConfigError(
                Bilingual(
                    f"decompose_factor = {self.decompose_factor}: must be -1 or at least 1.",
                    f"decompose_factor = {self.decompose_factor}：须为 -1 或至少为 1。",
                )
            )


class LoKrLayer(LycorisAdapter):
    """LoKr on a layer: `lokr_w1.<adapter>` for C, or `lokr_w1_a` and `lokr_w1_b`; `lokr_w2` for D likewise, and
    `lokr_t2` for its core.
    """

    def __init__(self, config: LoKrConfig, layer: Layer, name: str) -> None:
        base = layer.base_layer
        if is_convolution(base):
            out_features, (in_features, *window) = base.weight.shape[0], base.weight.shape[1:]
        else:
            (in_features, out_features), window = features(base), []
        (e, g), (f, h) = (_factors(size, config.decompose_factor) for size in (out_features, in_features))
        start_C, start_D = nn.init.zeros_, kaiming
        if config.init_weights != True:  # noqa: E712, "lycoris" is true as well
            start_C, start_D = kaiming, nn.init.zeros_ if config.init_weights else kaiming
        parts: dict[str, nn.Module | nn.Parameter] = {}
        if config.decompose_both and config.r < max(e, f) / 2:
            parts["lokr_w1_a"] = new_parameter(layer, e, config.r, start=start_C)
            parts["lokr_w1_b"] = new_parameter(layer, config.r, f, start=kaiming)
        else:
            parts["lokr_w1"] = new_parameter(layer, e, f, start=start_C)
        core = core_window(config, base)
        if config.r < max(g, h) / 2 and core:
            parts["lokr_t2"] = new_parameter(layer, config.r, config.r, *core, start=kaiming)
            parts["lokr_w2_a"] = new_parameter(layer, config.r, g, start=kaiming)
            parts["lokr_w2_b"] = new_parameter(layer, config.r, h, start=start_D)
        elif config.r < max(g, h) / 2:
            parts["lokr_w2_a"] = new_parameter(layer, g, config.r, start=kaiming)
            parts["lokr_w2_b"] = new_parameter(layer, config.r, h * math.prod(window), start=start_D)
        else:
            parts["lokr_w2"] = new_parameter(layer, g, h, *window, start=start_D)
        self.whole = {key for key in ("lokr_w1", "lokr_w2") if key in parts}
        self.has_core = "lokr_t2" in parts
        self.keeps_mean = config.rank_dropout_scale
        super().__init__(config, layer, name, parts)

    def delta(self) -> Tensor:
        """s (C ⊗ D), in the shape of the layer's weight."""
        C = self._factor("lokr_w1")
        if self.has_core:
            D = with_core(self.part("lokr_t2"), self.part("lokr_w2_a"), self.part("lokr_w2_b"))
        else:
            D = self._factor("lokr_w2")
        # of three dimensions PEFT takes the product as torch has it: the outputs have another order
        product = torch.kron(C.contiguous(), D.contiguous() if D.dim() == 3 else D.flatten(1))
        return self.as_weight(self.s * product)

    def update(self, x: Tensor) -> Tensor:
        """s C X D^T on a linear layer."""
        if not is_linear(self.layer.base_layer):
            return super().update(x)
        C_EF = self._factor("lokr_w1").to(x.dtype)
        y = x.unflatten(-1, (C_EF.shape[1], -1))
        for key in ("lokr_w2",) if "lokr_w2" in self.whole else ("lokr_w2_b", "lokr_w2_a"):
            y = y @ self.part(key).to(x.dtype).T
        return self.s * (y.transpose(-1, -2) @ C_EF.T).transpose(-1, -2).flatten(-2)

    def _factor(self, key: str) -> Tensor:
        return self.part(key) if key in self.whole else self.part(f"{key}_a") @ self.part(f"{key}_b")


class LoKr(LayerMethod[LoKrConfig]):
    """Kronecker products of two small matrices."""

    name = "lokr"
    config = LoKrConfig
    learning_rate = 3e-3
    learning_rate_source = Bilingual(
        "PEFT's comparison on MetaMathQA: 3e-3 with decompose_factor = 4",
        "PEFT 在 MetaMathQA 上的对比：decompose_factor = 4 时 3e-3",
    )
    trains = Bilingual("Kronecker products of two small matrices", "两个小矩阵的克罗内克积")
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    def supports(self, layer: nn.Module) -> bool:
        return is_linear(layer) or is_convolution(layer)

    def make(self, config: LoKrConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> LoKrLayer:
        return LoKrLayer(config, layer, name)


def _factors(size: int, most: int) -> tuple[int, int]:
    """Two factors of a number, the first at most `most` and, but where that one divides it, the smaller; -1: the two
    that are nearest to each other.
    """
    if most > 0 and size % most == 0:
        return most, size // most
    first = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0 and (n <= most or most == -1))
    return first, size // first
