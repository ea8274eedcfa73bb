"""BOFT: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization (Liu et al., 2024, arXiv:2311.06243).

    y = s * (W B x) + b        B = B_0 ... B_M-1,  B_i = P_i diag(R_i1 ... R_iN) P_i^T
                               R_ij the Cayley transform of a skew-symmetric Q_ij, P_i a permutation

OFT's rotation of blocks, M times: P_i gives each factor other pairs of half blocks, so that an input reaches
S 2^(M - 1) of them. Q = 0 and s = 1 at the start, so B = 1.

P_i^T shuffles the inputs in groups of 2^i blocks: half a block of the group's first half, half a block of its second
half, and so on. P_0 = 1.

Shapes: x (T, I), y (T, O), R_ij (S, S), s (O,); boft_R (M, N, S, S), of which Q is the skew-symmetric part; I = N S,
S = boft_block_size, N = boft_block_num, M = boft_n_butterfly_factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.computed import ComputedParameters
from siliang.methods.config import CONFIG_NAME
from siliang.methods.layer import BaseForward, Layer, LayerAdapter, new_parameter
from siliang.methods.layer_method import BlocksConfig, LayerMethod, check_divides, check_one_set
from siliang.methods.oft import by_block, cayley
from siliang.methods.transforms import InputTransform
from siliang.models.introspect import as_stored, features, flat_features, is_linear, is_whole_convolution, out_by_in
from siliang.types import ConfigError, PeftType


@dataclass(kw_only=True)
class BOFTConfig(BlocksConfig):
    """BOFT's settings, with PEFT's names and defaults.

    Attributes:
        boft_block_size: Size of a block; 0 where boft_block_num is set.
        boft_block_num: Number of blocks; 0 where boft_block_size is set.
        boft_n_butterfly_factor: Number of factors. 1 is OFT with a scaling of the outputs.
        boft_dropout: Share of the blocks of one factor, drawn anew each time, that do not turn during training.
        fan_in_fan_out: The base weight is stored (in, out). Found by itself for GPT-2's Conv1D; kept for the file.
        bias: The base biases that are trained too: "none", "all", or of the tuned layers ("boft_only").
        init_weights: Start from B = 1. False: from random turns, for tests.
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "boft_only"] = "none"
    init_weights: bool = True

    peft_type: ClassVar[str] = PeftType.BOFT
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("boft_n_butterfly_factor",)
    PROBABILITIES: ClassVar[tuple[str, ...]] = ("boft_dropout",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_set("boft_block_size", self.boft_block_size, "boft_block_num", self.boft_block_num)


@dataclass(frozen=True)
class Butterfly:
    """The factors B_i of a layer.

    Attributes:
        size, blocks: S and N.
    """

    config: BOFTConfig
    size: int
    blocks: int

    @classmethod
    def of(cls, config: BOFTConfig, width: int) -> Butterfly:
        """Those of so many inputs."""
        return cls(config, *_size_and_blocks(config, width))

    def start(self, layer: Layer, *scales: int) -> dict[str, nn.Parameter]:
        """What is trained, as it starts.

        Args:
            scales: The shape of s.
        """
        random = partial(nn.init.normal_, std=0.1)
        start = nn.init.constant_ if self.config.init_weights else random
        shape = (self.config.boft_n_butterfly_factor, self.blocks, self.size, self.size)
        return {
            "boft_R": new_parameter(layer, *shape, start=lambda values: start(values, 0.0)),
            "boft_s": new_parameter(layer, *scales, start=lambda values: start(values, 1.0)),
        }

    def matrices(self, values: Tensor, *, training: bool) -> Tensor:
        """The blocks of each factor, (M, N, S, S); rows are inputs."""
        R_MNSS = cayley(0.5 * (values - values.mT), None)
        dropped = int(self.config.boft_dropout * R_MNSS.shape[1])
        if training and dropped:
            level = int(torch.randint(len(R_MNSS), ()))
            still = torch.zeros(R_MNSS.shape[:2], dtype=torch.bool, device=R_MNSS.device)
            still[level] = torch.randperm(R_MNSS.shape[1], device=R_MNSS.device) < dropped
            R_MNSS = torch.where(still[..., None, None], torch.eye(self.size).to(R_MNSS), R_MNSS)
        return R_MNSS

    def turned(self, x_TI: Tensor, R_MNSS: Tensor, levels: Iterable[int]) -> Tensor:
        """x, factor by factor."""
        for level in levels:
            turned_TI = by_block(_shuffled(x_TI, level, self.size), R_MNSS[level])
            x_TI = _unshuffled(turned_TI, level, self.size)
        return x_TI


class BOFTLayer(InputTransform):
    """BOFT on a linear layer: `boft_R.<adapter>` (M, N, S, S) and `boft_s` (O, 1)."""

    def __init__(self, config: BOFTConfig, layer: Layer, name: str) -> None:
        in_features, out_features = features(layer.base_layer)
        self.butterfly = Butterfly.of(config, in_features)
        super().__init__(layer, name, self.butterfly.start(layer, out_features, 1))

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        """The bias is not scaled: y' + (1 - s) b is s * (y' - b) + b."""
        y, s = base_forward(self.transform(x)), self.part("boft_s").flatten()
        bias = self.layer.base_layer.bias
        if not base_forward.is_base_layer:  # other adapters may have changed it
            bias = base_forward(torch.zeros_like(x[..., :1, :]))
        y = y * s.to(y.dtype)
        return y if bias is None else y + ((1 - s) * bias).to(y.dtype)

    def transform(self, x_TI: Tensor) -> Tensor:
        """B x, the last factor first."""
        R_MNSS = self.butterfly.matrices(self.part("boft_R"), training=self.layer.training)
        return self.butterfly.turned(x_TI, R_MNSS, reversed(range(len(R_MNSS))))

    def merged(self) -> dict[str, Tensor]:
        """s * (W B), and the bias as it is."""
        base = self.layer.base_layer
        W_OI = out_by_in(base, super().merged()["weight"])
        return {"weight": as_stored(base, W_OI * self.part("boft_s"))}


class BOFTConv(ComputedParameters):
    """BOFT on a convolution: B turns the patches of its input, and I counts the places of the window too. `boft_s` is
    (1, O)."""

    def __init__(self, config: BOFTConfig, layer: Layer, name: str) -> None:
        in_features, out_features = flat_features(layer.base_layer)
        self.butterfly = Butterfly.of(config, in_features)
        super().__init__(layer, name, self.butterfly.start(layer, 1, out_features))

    def functions(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        return {"weight": self._turned}

    def _turned(self, W: Tensor) -> Tensor:
        """s * (W B): B^T of the rows of W, the first factor first."""
        R_MNSS = self.butterfly.matrices(self.part("boft_R"), training=self.layer.training)
        WB = self.butterfly.turned(W.flatten(1), R_MNSS.mT, range(len(R_MNSS)))
        return (self.part("boft_s").T * WB).view_as(W)


class BOFT(LayerMethod[BOFTConfig]):
    """Rotations of the inputs of linear layers, of several sparse factors, and a scaling of the outputs."""

    name = "boft"
    config = BOFTConfig
    learning_rate = 1e-4
    learning_rate_source = Bilingual("PEFT's comparison on MetaMathQA: 1e-4", "PEFT 在 MetaMathQA 上的对比：1e-4")
    trains = Bilingual(
        "rotations of the inputs of chosen linear layers, and scales of their outputs",
        "所选线性层输入的旋转和输出的缩放",
    )

    def supports(self, layer: nn.Module) -> bool:
        return is_linear(layer) or is_whole_convolution(layer)

    def make(self, config: BOFTConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> LayerAdapter:
        return (BOFTLayer if is_linear(layer.base_layer) else BOFTConv)(config, layer, name)

    def shape_hint(self, key: str, found: Sequence[int], needed: Sequence[int]) -> str:
        if "boft_R" not in key or len(found) != 4 or tuple(found[1:]) != tuple(needed[1:]):
            return ""
        file = f"The file has {found[0]} factor{'s' * (found[0] != 1)} where {CONFIG_NAME} has boft_n_butterfly_factor"
        file_zh = f"文件中有 {found[0]} 个因子，而 {CONFIG_NAME} 中 boft_n_butterfly_factor"
        if found[0] == 1:
            return Bilingual(
                f"{file} = {needed[0]}: PEFT without its CUDA extension trains and saves one. Set it to 1 there.",
                f"{file_zh} = {needed[0]}：PEFT 没有其 CUDA 扩展时只训练并保存一个因子。请在该文件中把它设为 1。",
            )
        return Bilingual(f"{file} = {needed[0]}: was it changed?", f"{file_zh} = {needed[0]}：它是否被改过？")


def _size_and_blocks(config: BOFTConfig, in_features: int) -> tuple[int, int]:
    """S and N of a layer.

    Raises:
        ConfigError: The layer cannot be cut like this.
    """
    for key in ("boft_block_size", "boft_block_num"):
        if value := getattr(config, key):
            check_divides(key, value, in_features, "inputs")
    size = config.boft_block_size or in_features // config.boft_block_num
    blocks, factors = in_features // size, config.boft_n_butterfly_factor
    if factors > 1 and (size % 2 or blocks % 2 ** min(factors - 1, 64)):
        raise ConfigError(
            Bilingual(
                f"boft_n_butterfly_factor = {factors}: {in_features} inputs are {blocks} blocks of {size}, and more "
                f"than one factor takes an even size, and a multiple of 2^{factors - 1} blocks.",
                f"boft_n_butterfly_factor = {factors}：{in_features} 个输入分为 {blocks} 块，每块 {size}；"
                f"多于一个因子时，块大小须为偶数，块数须为 2^{factors - 1} 的倍数。",
            )
        )
    return size, blocks


def _shuffled(x_TI: Tensor, level: int, size: int) -> Tensor:
    """P^T of a factor."""
    if level == 0:
        return x_TI
    return x_TI.unflatten(-1, (-1, 2, 2**level, size // 2)).transpose(-3, -2).flatten(-4)


def _unshuffled(x_TI: Tensor, level: int, size: int) -> Tensor:
    """P of a factor: the way back."""
    if level == 0:
        return x_TI
    return x_TI.unflatten(-1, (-1, 2**level, 2, size // 2)).transpose(-3, -2).flatten(-4)
