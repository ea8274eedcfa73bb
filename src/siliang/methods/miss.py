"""MiSS: Matrix Shard Sharing (Kang and Yin, 2024, arXiv:2409.15371), which was called Bone before.

    y = W x + D (x_1 + ... + x_N)        the shards x_n of the input, R numbers each, share D; D = 0 at the start

"mini": outputs in the same place of each group of M share a row of D.
"bat": y = (W + W_jn B_j + B_j) x, with a square block B_j for the outputs j of each R, and W_jn the base's own blocks.

Shapes: x (T, I), D (M, R), stored as (R, M), where M = O but for "mini", B (O / R, R, R); I in, O out, N = I / R,
rounded up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.additive import Additive
from siliang.methods.computed import ComputedParameters
from siliang.methods.layer import Layer, LayerAdapter, kaiming, new_parameter
from siliang.methods.layer_method import BlocksConfig, LayerMethod, check_divides, check_fits
from siliang.models.introspect import features
from siliang.types import PeftType


@dataclass(kw_only=True)
class MissConfig(BlocksConfig):
    """MiSS's settings, with PEFT's names and defaults.

    Attributes:
        r: Size of a shard of the input, at most the layer's inputs.
        miss_dropout: Probability of zeroing an input of the update during training; of no effect with "bat".
        mini_r: With "mini": size of the groups of outputs, which divides them.
        init_weights: True: the first equation, zero at the start; False: random at the start, for tests. "mini" and
            "bat": the others.
        bias: The base biases that are trained too: "none", "all", or of the tuned layers ("MiSS_only").
    """

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | Literal["bat", "mini"] = True
    bias: Literal["none", "all", "MiSS_only", "miss_only"] = "none"

    peft_type: ClassVar[str] = PeftType.MISS
    FORMER_TYPES: ClassVar[tuple[str, ...]] = ("BONE",)
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("r", "mini_r")
    PROBABILITIES: ClassVar[tuple[str, ...]] = ("miss_dropout",)


class ShardSharing(Additive):
    """MiSS on a linear layer: `miss_block.<adapter>` (R, M)."""

    def __init__(self, config: MissConfig, layer: Layer, name: str) -> None:
        self.dropout_p = config.miss_dropout
        self.settings = {"miss_r": config.r, "miss_mini_r": config.mini_r, "miss_dropout": nn.Dropout(self.dropout_p)}
        self.in_features, self.out_features = features(layer.base_layer)
        outputs = config.mini_r if config.init_weights == "mini" else self.out_features
        check_fits("r", config.r, self.in_features, "inputs")
        check_divides("mini_r", outputs, self.out_features, "outputs")
        start = nn.init.zeros_ if config.init_weights else kaiming
        super().__init__(layer, name, {"miss_block": new_parameter(layer, config.r, outputs, start=start)})

    def delta(self) -> Tensor:
        """D repeated N times along the inputs and cut to I; along the outputs where they share it."""
        D_MR = self.part("miss_block").T
        times = -(-self.in_features // D_MR.shape[1])
        return D_MR.repeat(self.out_features // D_MR.shape[0], times)[:, : self.in_features]

    def update(self, x: Tensor) -> Tensor:
        D_RM = self.part("miss_block").to(x.dtype)
        x_TI = F.pad(x, (0, -self.in_features % len(D_RM))) if self.in_features % len(D_RM) else x
        y_TM = x_TI.unflatten(-1, (-1, len(D_RM))).sum(-2) @ D_RM
        return y_TM.repeat(*[1] * (y_TM.dim() - 1), self.out_features // D_RM.shape[1])


class BlockAffine(ComputedParameters):
    """MiSS's "bat" on a linear layer: `miss_block.<adapter>` (O / R, R, R)."""

    def __init__(self, config: MissConfig, layer: Layer, name: str) -> None:
        in_features, out_features = features(layer.base_layer)
        check_divides("r", config.r, in_features, "inputs")
        check_divides("r", config.r, out_features, "outputs")
        self.settings = {"miss_r": config.r}
        block = new_parameter(layer, out_features // config.r, config.r, config.r)
        super().__init__(layer, name, {"miss_block": block})

    def functions(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        return {"weight": self._changed}

    def _changed(self, W_OI: Tensor) -> Tensor:
        B_JRR = self.part("miss_block").to(W_OI.dtype)
        W_JRNR = W_OI.unflatten(0, (len(B_JRR), -1)).unflatten(-1, (-1, B_JRR.shape[1]))
        change = torch.einsum("jrns,jst->jrnt", W_JRNR, B_JRR) + B_JRR[:, :, None]
        return W_OI + change.reshape(W_OI.shape)


class Miss(LayerMethod[MissConfig]):
    """Updates that the shards of a layer's input share."""

    name = "miss"
    config = MissConfig
    learning_rate = 1e-4
    learning_rate_source = Bilingual(
        "PEFT's comparison on MetaMathQA: 1e-4; its example: 2e-5", "PEFT 在 MetaMathQA 上的对比：1e-4；其示例：2e-5"
    )
    trains = Bilingual("an update that the shards of a layer's input share", "层输入的各分片共享的更新")

    def make(self, config: MissConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> LayerAdapter:
        return (BlockAffine if config.init_weights == "bat" else ShardSharing)(config, layer, name)

    def from_file(self, config: MissConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Bone's tensors have other names, and are the same."""
        return {key.replace(".bone_block", ".miss_block"): t for key, t in tensors.items()}
