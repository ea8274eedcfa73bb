"""FourierFT: Fine-Tuning with the Discrete Fourier Transform (Gao et al., 2024, arXiv:2405.03003).

    y = (W + s Re ifft2(C)) x        C is zero but at N places, whose values are trained

The places are drawn from a seed and are not in the file. Layers of one shape have the same.

Shapes: W, C (O, I), values (N,); I in, O out, N = n_frequency.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.additive import Additive
from siliang.methods.layer import Layer, new_parameter
from siliang.methods.layer_method import BlocksConfig, LayerMethod, check_fits, check_ranks, check_seed
from siliang.methods.method import SharedSpec
from siliang.methods.targets import FOURIERFT_TARGETS
from siliang.models.introspect import features
from siliang.types import PeftType


@dataclass(kw_only=True)
class FourierFTConfig(BlocksConfig):
    """FourierFT's settings, with PEFT's names and defaults.

    Attributes:
        n_frequency: How many frequencies a layer trains: at most as many as it has weights.
        scaling: s. It is large, because the transform divides by the number of weights.
        random_loc_seed: Seed of the places.
        fan_in_fan_out: The base weight is stored (in, out). Found by itself for GPT-2's Conv1D; kept for the file.
        bias: The base biases that are trained too: "none", "all", or of the tuned layers ("fourier_only").
        n_frequency_pattern: n_frequency for layers whose name ends in, or matches, the key: the first that does.
        init_weights: The values start at zero. False: at random, so that training does not start from the base model.
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "fourier_only", "fourierft_only"] = "none"
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool = False

    peft_type: ClassVar[str] = PeftType.FOURIERFT
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("n_frequency",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks("n_frequency_pattern", self.n_frequency_pattern)
        check_seed("random_loc_seed", self.random_loc_seed)


class FourierFTLayer(Additive):
    """FourierFT on a linear layer: `fourierft_spectrum.<adapter>` (N,)."""

    def __init__(self, config: FourierFTConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> None:
        self.in_features, self.out_features = features(layer.base_layer)
        check_fits("n_frequency", config.n_frequency, self.in_features * self.out_features, "weights")
        self.s, self.shared = config.scaling, shared
        self.settings = {"fourierft_n_frequency": config.n_frequency, "fourierft_scaling": config.scaling}
        start = nn.init.zeros_ if config.init_weights else nn.init.normal_
        super().__init__(layer, name, {"fourierft_spectrum": new_parameter(layer, config.n_frequency, start=start)})

    def delta(self) -> Tensor:
        """s Re ifft2(C), in fp32: half precision has no transform."""
        values, shape = self.part("fourierft_spectrum").float(), (self.out_features, self.in_features)
        places = self.shared[_key(*shape)].to(values.device)[: len(values)]
        C_OI = values.new_zeros(shape[0] * shape[1]).index_copy(0, places, values).view(shape)
        return self.s * torch.fft.ifft2(C_OI).real


class FourierFT(LayerMethod[FourierFTConfig]):
    """Updates with few frequencies."""

    name = "fourierft"
    config = FourierFTConfig
    learning_rate = 5e-2
    learning_rate_source = Bilingual(
        "the authors' scripts for RoBERTa on GLUE: 5e-2 to 1.2e-1", "作者用于 RoBERTa 和 GLUE 的脚本：5e-2 至 1.2e-1"
    )
    trains = Bilingual("some frequencies of an update of the weight", "权重更新的少量频率分量")
    default_targets = FOURIERFT_TARGETS
    patterns: ClassVar[Mapping[str, str]] = {"n_frequency_pattern": "n_frequency"}

    def shared(self, config: FourierFTConfig, layers: Mapping[str, nn.Module]) -> Mapping[str, SharedSpec]:
        most = max(config.n_frequency, *config.n_frequency_pattern.values(), 0)
        found: dict[str, SharedSpec] = {}
        for columns, rows in {features(layer) for layer in layers.values()}:
            number = min(most, rows * columns)
            make = partial(_places, number, rows * columns, config.random_loc_seed)
            found[_key(rows, columns)] = SharedSpec((number,), make, trained=False, saved=False)
        return found

    def make(self, config: FourierFTConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> FourierFTLayer:
        return FourierFTLayer(config, layer, name, shared)


def _key(rows: int, columns: int) -> str:
    return f"fourierft_places_{rows}x{columns}"


def _places(number: int, size: int, seed: int, device: torch.device) -> Tensor:
    """The first places of a matrix of `size` numbers, row after row, in PEFT's order for the seed; (number,)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator, device="cpu")[:number].to(device)
