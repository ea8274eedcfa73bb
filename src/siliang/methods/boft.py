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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.config import CONFIG_NAME
from siliang.methods.layer import BaseForward, Layer, new_parameter
from siliang.methods.layer_method import BlocksConfig, LayerMethod, check_divides, check_one_set
from siliang.methods.oft import cayley
from siliang.methods.transforms import InputTransform
from siliang.models.introspect import as_stored, features, out_by_in
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
    ONLY_IN_PEFT: ClassVar[tuple[str, ...]] = ("Conv2d",)
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("boft_n_butterfly_factor",)
    PROBABILITIES: ClassVar[tuple[str, ...]] = ("boft_dropout",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_set("boft_block_size", self.boft_block_size, "boft_block_num", self.boft_block_num)


class BOFTLayer(InputTransform):
    """BOFT on a linear layer: `boft_R.<adapter>` (M, N, S, S) and `boft_s` (O, 1)."""

    def __init__(self, config: BOFTConfig, layer: Layer, name: str) -> None:
        in_features, out_features = features(layer.base_layer)
        self.size, blocks = _size_and_blocks(config, in_features)
        self.dropout_p = config.boft_dropout
        start = nn.init.constant_ if config.init_weights else partial(nn.init.normal_, std=0.1)
        shape = (config.boft_n_butterfly_factor, blocks, self.size, self.size)
        parts = {
            "boft_R": new_parameter(layer, *shape, start=lambda values: start(values, 0.0)),
            "boft_s": new_parameter(layer, out_features, 1, start=lambda values: start(values, 1.0)),
        }
        super().__init__(layer, name, parts)

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        """The bias is not scaled: y' + (1 - s) b is s * (y' - b) + b."""
        y, s = base_forward(self.transform(x)), self.part("boft_s").flatten()
        bias = self.layer.base_layer.bias
        if not base_forward.is_base_layer:  # other adapters may have changed it
            bias = base_forward(torch.zeros_like(x[..., :1, :]))
        y = y * s.to(y.dtype)
        return y if bias is None else y + ((1 - s) * bias).to(y.dtype)

    def transform(self, x_TI: Tensor) -> Tensor:
        """B x, factor by factor, the last one first."""
        R_MNSS = self.rotations().to(x_TI.dtype)
        for level in reversed(range(len(R_MNSS))):
            x_TNS = _shuffled(x_TI, level, self.size).unflatten(-1, (-1, self.size))
            turned_TI = torch.einsum("...ns,nst->...nt", x_TNS, R_MNSS[level]).flatten(-2)
            x_TI = _unshuffled(turned_TI, level, self.size)
        return x_TI

    def rotations(self) -> Tensor:
        """The blocks of each factor, (M, N, S, S); rows are inputs."""
        values = self.part("boft_R")
        R_MNSS = cayley(0.5 * (values - values.mT), None)
        dropped = int(self.dropout_p * R_MNSS.shape[1])
        if self.layer.training and dropped:
            level = int(torch.randint(len(R_MNSS), ()))
            still = torch.zeros(R_MNSS.shape[:2], dtype=torch.bool, device=R_MNSS.device)
            still[level] = torch.randperm(R_MNSS.shape[1], device=R_MNSS.device) < dropped
            R_MNSS = torch.where(still[..., None, None], torch.eye(self.size).to(R_MNSS), R_MNSS)
        return R_MNSS

    def merged(self) -> dict[str, Tensor]:
        """s * (W B), and the bias as it is."""
        base = self.layer.base_layer
        W_OI = out_by_in(base, super().merged()["weight"])
        return {"weight": as_stored(base, W_OI * self.part("boft_s"))}


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

    def make(self, config: BOFTConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> BOFTLayer:
        return BOFTLayer(config, layer, name)

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
