"""C3A: Circular Convolution Adaptation (Chen et al., 2024, arXiv:2407.19342).

    y_m = W_m x + 1/I sum_n k_mn * x_n        * circular correlation: (k * x)[i] = sum_j k[j] x[i + j]

Inputs and outputs are cut into blocks of B numbers, and a block of the update follows from B numbers in place of B^2.
It is computed with Fourier transforms of the blocks.

Shapes: W (O, I), k (M, N, B), x_n (T, B), y_m (T, B); I = N B in, O = M B out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.additive import Additive
from siliang.methods.layer import Layer, new_parameter
from siliang.methods.layer_method import BlocksConfig, LayerMethod, check_divides, check_ranks
from siliang.methods.targets import FOURIERFT_TARGETS
from siliang.models.introspect import features
from siliang.types import PeftType


@dataclass(kw_only=True)
class C3AConfig(BlocksConfig):
    """C3A's settings, with PEFT's names and defaults.

    Attributes:
        block_size: B, which divides inputs and outputs: a larger block has fewer parameters.
        bias: The base biases that are trained too: "none", "all", or of the tuned layers ("c3a_only").
        block_size_pattern: block_size for layers whose name ends in, or matches, the key: the first that does.
        init_weights: "xavier_uniform" (False means it too), "kaiming_uniform" or "gaussian"; True: zero, so that
            training starts from the base model.
    """

    block_size: int = 256
    bias: Literal["none", "all", "c3a_only"] = "none"
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] = "xavier_uniform"

    peft_type: ClassVar[str] = PeftType.C3A
    NOT_IN_PEFT: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("block_size",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks("block_size_pattern", self.block_size_pattern)

    def start(self, in_features: int, out_features: int) -> Callable[[Tensor], object]:
        """What fills the kernel of a layer."""
        if self.init_weights is True:
            return nn.init.zeros_
        if self.init_weights == "gaussian":
            return nn.init.normal_
        fan = in_features if self.init_weights == "kaiming_uniform" else (in_features + out_features) / 6
        return partial(nn.init.uniform_, a=-math.sqrt(1 / fan), b=math.sqrt(1 / fan))


class C3ALayer(Additive):
    """C3A on a linear layer: `c3a_kernel.<adapter>` (M, N, B)."""

    def __init__(self, config: C3AConfig, layer: Layer, name: str) -> None:
        in_features, out_features = features(layer.base_layer)
        check_divides("block_size", B := config.block_size, in_features, "inputs")
        check_divides("block_size", B, out_features, "outputs")
        self.settings = {"block_size": B}
        start = config.start(in_features, out_features)
        kernel = new_parameter(layer, out_features // B, in_features // B, B, start=start)
        super().__init__(layer, name, {"c3a_kernel": kernel})

    def delta(self) -> Tensor:
        """Rows of a block are turned one place to the right, each further than the one above it."""
        k_MNB = self.part("c3a_kernel")
        M, N, B = k_MNB.shape
        place = torch.arange(B, device=k_MNB.device)
        blocks_MNBB = k_MNB[:, :, (place - place[:, None]) % B]
        return blocks_MNBB.transpose(1, 2).reshape(M * B, N * B) / (N * B)

    def update(self, x: Tensor) -> Tensor:
        """By the transforms, in fp32: half precision has none for most sizes."""
        wide = torch.promote_types(x.dtype, torch.float32)
        k_MNB = self.part("c3a_kernel").to(wide)
        with torch.autocast(x.device.type, enabled=False):
            x_TNF = torch.fft.rfft(x.to(wide).unflatten(-1, k_MNB.shape[1:]))
            y_TMF = torch.einsum("...nf,mnf->...mf", x_TNF, torch.fft.rfft(k_MNB).conj())
            y_TMB = torch.fft.irfft(y_TMF, n=k_MNB.shape[2])
        return (y_TMB.flatten(-2) / x.shape[-1]).to(x.dtype)


class C3A(LayerMethod[C3AConfig]):
    """Circular convolutions of blocks."""

    name = "c3a"
    config = C3AConfig
    learning_rate = 1e-1
    learning_rate_source = Bilingual(
        "PEFT's documentation: 1e-1 to begin with; its comparison on MetaMathQA: 3e-1",
        "PEFT 文档：可从 1e-1 开始；其在 MetaMathQA 上的对比：3e-1",
    )
    trains = Bilingual("circular convolutions of blocks of the input", "输入分块的循环卷积")
    default_targets = FOURIERFT_TARGETS
    patterns: ClassVar[Mapping[str, str]] = {"block_size_pattern": "block_size"}

    def make(self, config: C3AConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> C3ALayer:
        return C3ALayer(config, layer, name)
