"""HiRA: Hadamard High-Rank Adaptation (Huang et al., ICLR 2025, openreview TwJrTz9cRS).

    y = (W + W * (B A)) x        * elementwise, B = 0: at the start y = W x exactly

The elementwise product with W, whose rank is full, has a rank of up to R times W's. On an embedding the rows that are
looked up are multiplied: y = W[x] (1 + (B A)[x]).

Shapes: W (O, I), A (R, I), B (O, R); a convolution's A (R, C, window), B (O, R, 1 ...); an embedding's W (V, D),
A (R, V), B (D, R); I in, O out, C channels in, V rows of the table, D columns, R = r.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.additive import Additive
from siliang.methods.layer import BaseForward, Layer, LayerAdapter, kaiming, new_parameter
from siliang.methods.layer_method import BlocksConfig, LayerMethod, check_ranks
from siliang.models.introspect import features, is_convolution, is_linear, is_whole_convolution
from siliang.types import PeftType


@dataclass(kw_only=True)
class HiraConfig(BlocksConfig):
    """HiRA's settings, with PEFT's names and defaults.

    Attributes:
        r: Rank of B A.
        hira_dropout: Probability of zeroing an input of the update during training; not on embeddings.
        fan_in_fan_out: The base weight is stored (in, out). Found by itself for GPT-2's Conv1D; kept for the file.
        init_weights: True: A at random as nn.Linear's weight, B zero. "gaussian": A normal with deviation 1/r, B zero.
            False: both random, for tests.
        rank_pattern: r for layers whose name ends in, or matches, the key: the first that does, in the order given.
    """

    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | Literal["gaussian"] = True
    rank_pattern: dict[str, int] = field(default_factory=dict)

    peft_type: ClassVar[str] = PeftType.HIRA
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("r",)
    PROBABILITIES: ClassVar[tuple[str, ...]] = ("hira_dropout",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks("rank_pattern", self.rank_pattern)

    def starts(self) -> tuple[Callable[[Tensor], object], Callable[[Tensor], object]]:
        """What fills the factor that starts at random, and the one that starts at zero."""
        if not self.init_weights:
            return nn.init.normal_, nn.init.normal_
        return partial(nn.init.normal_, std=1 / self.r) if self.init_weights == "gaussian" else kaiming, nn.init.zeros_


class HiraLayer(Additive):
    """HiRA on a linear layer or a convolution: `hira_A.<adapter>` (R, I), `hira_B.<adapter>` (O, R)."""

    def __init__(self, config: HiraConfig, layer: Layer, name: str) -> None:
        self.dropout_p = config.hira_dropout
        self.settings = {"r": config.r, "hira_dropout": nn.Dropout(self.dropout_p)}
        base = layer.base_layer
        if is_convolution(base):
            out_features, (in_features, *window) = base.weight.shape[0], base.weight.shape[1:]
        else:
            (in_features, out_features), window = features(base), []
        of_A, of_B = config.starts()
        A = new_parameter(layer, config.r, in_features, *window, start=of_A)
        B = new_parameter(layer, out_features, config.r, *[1] * len(window), start=of_B)
        super().__init__(layer, name, {"hira_A": A, "hira_B": B})

    def delta(self) -> Tensor:
        """W * (B A), of the base's own W: other adapters that are merged leave it as it is."""
        W, BA_OI = self.own_weight(), self.part("hira_B").flatten(1) @ self.part("hira_A").flatten(1)
        return W * BA_OI.view(W.shape)


class HiraEmbedding(LayerAdapter):
    """HiRA on an embedding: `hira_embedding_A.<adapter>` (R, V), `hira_embedding_B.<adapter>` (D, R)."""

    def __init__(self, config: HiraConfig, layer: Layer, name: str) -> None:
        self.settings = {"r": config.r}
        rows, columns = layer.base_layer.weight.shape
        normal, zeros = nn.init.normal_, config.starts()[1]
        A = new_parameter(layer, config.r, rows, start=zeros)
        B = new_parameter(layer, columns, config.r, start=normal)
        super().__init__(layer, name, {"hira_embedding_A": A, "hira_embedding_B": B})

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        y = base_forward(x)
        own = y if base_forward.is_base_layer else base_forward.through(self.layer.base_layer, x)
        factors = F.embedding(x, self.part("hira_embedding_A").T) @ self.part("hira_embedding_B").T
        return y + own * factors.to(y.dtype)

    def merged(self) -> dict[str, Tensor]:
        factors_VD = (self.part("hira_embedding_B") @ self.part("hira_embedding_A")).T
        return {"weight": self.layer.base_layer.weight + self.layer.base_parameter("weight") * factors_VD}


class Hira(LayerMethod[HiraConfig]):
    """Elementwise products of a layer's weight and a low-rank matrix."""

    name = "hira"
    config = HiraConfig
    learning_rate = 4.5e-3
    learning_rate_source = Bilingual(
        "PEFT's comparison on MetaMathQA: 4.5e-3 with r = 32; its example: 3e-4",
        "PEFT 在 MetaMathQA 上的对比：r = 32 时 4.5e-3；其示例：3e-4",
    )
    trains = Bilingual("low-rank factors that multiply the weights elementwise", "与权重逐元素相乘的低秩因子")
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "r"}

    def supports(self, layer: nn.Module) -> bool:
        return is_linear(layer) or is_whole_convolution(layer) or isinstance(layer, nn.Embedding)

    def make(self, config: HiraConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> LayerAdapter:
        return (HiraEmbedding if isinstance(layer.base_layer, nn.Embedding) else HiraLayer)(config, layer, name)
