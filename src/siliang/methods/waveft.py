"""WaveFT: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets (Bilican et al., 2025,
arXiv:2505.12532).

    y = (W + s IDWT(C)) x        C: n_frequency numbers at random places, which are trained, and zeros

IDWT is one step of the inverse wavelet transform, by which a number changes a few neighbours of the weight. Without it
(use_idwt False) C itself is added. C = 0 at the start.

Shapes: W (O, I), C (O, I), padded at its edges for the wavelet's length; s = scaling; I in, O out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.additive import Additive
from siliang.methods.layer import Layer, MakeAdapter, new_parameter
from siliang.methods.layer_method import BlocksConfig, LayerMethod, check_ranks, check_seed
from siliang.methods.method import Parts
from siliang.methods.targets import FOURIERFT_TARGETS
from siliang.models.introspect import features
from siliang.ops.wavelets import FAMILIES, inverse_wavelet, lowpass
from siliang.types import ConfigError, PeftType


@dataclass(kw_only=True)
class WaveFTConfig(BlocksConfig):
    """WaveFT's settings, with PEFT's names and defaults.

    Attributes:
        n_frequency: Numbers that a layer trains.
        scaling: s.
        wavelet_family: db1 (Haar) to db10, or sym2 to sym10: the higher, the more neighbours a number changes.
        use_idwt: Transform C. False: add it as it is.
        random_loc_seed: Seed of the places.
        fan_in_fan_out: The base weight is stored (in, out). Found by itself for GPT-2's Conv1D; kept for the file.
        bias: The base biases that are trained too: "none", "all", or of the tuned layers ("waveft_only").
        n_frequency_pattern: n_frequency for layers whose name ends in, or matches, the key: the first that does, in
            the order given.
        proportional_parameters: Share n_frequency times the number of layers among them by the sizes of their weights.
        init_weights: The update is zero at the start. False: random, for tests.
    """

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "waveft_only"] = "none"
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True

    peft_type: ClassVar[str] = PeftType.WAVEFT
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("n_frequency",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks("n_frequency_pattern", self.n_frequency_pattern)
        if self.wavelet_family not in FAMILIES:
            raise ConfigError(
                Bilingual(
                    f"wavelet_family = {self.wavelet_family!r}: must be one of db1 to db10 and sym2 to sym10.",
                    f"wavelet_family = {self.wavelet_family!r}：须为 db1 至 db10 或 sym2 至 sym10。",
                )
            )
        check_seed("random_loc_seed", self.random_loc_seed)


class WaveFTLayer(Additive):
    """WaveFT on a linear layer: `waveft_spectrum.<adapter>` (n_frequency,)."""

    def __init__(self, config: WaveFTConfig, layer: Layer, name: str) -> None:
        n = config.n_frequency
        self.in_features, self.out_features = features(layer.base_layer)
        if n > (size := self.in_features * self.out_features):
            raise ConfigError(
                Bilingual(
                    f"n_frequency = {n}: must be at most the numbers of each weight, and one has {size}. Choose less, "
                    "or other target_modules.",
                    f"n_frequency = {n}：至多为每个权重的元素数，而有一个为 {size}。请减小，或另选 target_modules。",
                )
            )
        start = nn.init.zeros_ if config.init_weights else partial(nn.init.normal_, std=0.01)
        super().__init__(layer, name, {"waveft_spectrum": new_parameter(layer, n, start=start)})
        self.family = config.wavelet_family if config.use_idwt else None
        self.set_scaling(config.scaling)
        self.settings = {"waveft_n_frequency": n}
        self._places = torch.empty(0)
        if layer.base_layer.weight.device.type != "meta":
            generator = torch.Generator().manual_seed(config.random_loc_seed)  # as PEFT draws them, on the CPU
            self._places = torch.randperm(size, generator=generator)[:n].clone()

    def delta(self) -> Tensor:
        """s IDWT(C), (O, I)."""
        spectrum = self.part("waveft_spectrum")
        self._places = places = self._places.to(spectrum.device)
        rows, columns = places // self.in_features, places % self.in_features
        if self.family is None:
            return self._dense(spectrum, rows, columns, self.out_features, self.in_features)
        edge = len(lowpass(self.family)) - 2
        height, width = (size + edge + size % 2 for size in (self.out_features, self.in_features))
        rows, columns = rows + (height - self.out_features) // 2, columns + (width - self.in_features) // 2
        found = inverse_wavelet(self._dense(spectrum, rows, columns, height, width), self.family)
        return found[: self.out_features, : self.in_features]

    def _dense(self, spectrum: Tensor, rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
        """s C, (height, width)."""
        flat = spectrum.new_zeros(height * width).index_copy(0, rows * width + columns, self.s * spectrum)
        return flat.view(height, width)


class WaveFT(LayerMethod[WaveFTConfig]):
    """A few numbers in the wavelet spectrum of each weight's update."""

    name = "waveft"
    config = WaveFTConfig
    learning_rate = 1e-3
    learning_rate_source = Bilingual(
        "measured: 79% on SST-2 after 100 steps, 77% with 3e-3",
        "实测：SST-2 训练 100 步得 79%；用 3e-3 得 77%",
    )
    trains = Bilingual(
        "a few numbers in the wavelet spectrum of each weight's update", "各权重更新量的小波谱中的少量系数"
    )
    default_targets = FOURIERFT_TARGETS
    patterns: ClassVar[Mapping[str, str]] = {"n_frequency_pattern": "n_frequency"}

    def make(self, config: WaveFTConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> WaveFTLayer:
        return WaveFTLayer(config, layer, name)

    def attach(self, model: nn.Module, config: WaveFTConfig, *, saved: Sequence[str], from_file: bool) -> Parts:
        parts = super().attach(model, config, saved=saved, from_file=from_file)
        if not config.proportional_parameters:
            return parts
        sizes = {path: features(model.get_submodule(path)) for path in parts.layers}
        mean = sum(i * o for i, o in sizes.values()) / len(sizes)
        layers: dict[str, MakeAdapter] = {}
        for path, (i, o) in sizes.items():
            share = max(1, round(i * o / mean * config.n_frequency))
            layers[path] = partial(self.make, dataclasses.replace(config, n_frequency=share))
        return dataclasses.replace(parts, layers=layers)
