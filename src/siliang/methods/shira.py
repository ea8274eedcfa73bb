"""SHiRA: Sparse High Rank Adapters (Bhardwaj et al., 2024, arXiv:2406.13175).

    y = (W + S) x        S is zero but at N places of W, which are drawn once; its values start at zero

Shapes: W, S (O, I), values (N,), places (2, N): rows and columns; I in, O out, N = r (I + O), as many as LoRA's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.additive import Additive
from siliang.methods.config import LayerConfig
from siliang.methods.layer import Layer, new_parameter
from siliang.methods.layer_method import LayerMethod, check_seed
from siliang.methods.method import Parts
from siliang.methods.targets import VERA_TARGETS
from siliang.models.introspect import features
from siliang.types import AdapterError, ConfigError, PeftType


@dataclass(kw_only=True)
class ShiraConfig(LayerConfig):
    """SHiRA's settings, with PEFT's names and defaults.

    Attributes:
        r: A layer trains r (inputs + outputs) values. The rank of S is not bounded by it.
        mask_type: "random". Of a file any other too: the places are in the file.
        random_seed: Of the places; None: PyTorch's own.
        fan_in_fan_out: The base weight is stored (in, out). Found by itself for GPT-2's Conv1D; kept for the file.
        init_weights: The values start at zero. False: at random, for tests.
    """

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True

    peft_type: ClassVar[str] = PeftType.SHIRA
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("r",)
    NOT_IN_PEFT: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed("random_seed", self.random_seed)


class ShiraLayer(Additive):
    """SHiRA on a linear layer: `shira_weight.<adapter>` (N,), and `shira_indices` (2, N), which is not trained."""

    def __init__(self, config: ShiraConfig, layer: Layer, name: str) -> None:
        self.in_features, self.out_features = features(layer.base_layer)
        number, most = config.r * (self.in_features + self.out_features), self.in_features * self.out_features
        if number > most:
            shape, least = f"{self.out_features} × {self.in_features}", most // (self.in_features + self.out_features)
            raise ConfigError(
                Bilingual(
                    f"r = {config.r}: a layer's r (inputs + outputs) must be at most its weights, and one has {shape}. "
                    f"Set r to {least} or less, or choose other target_modules.",
                    f"r = {config.r}：每层的 r（输入数 + 输出数）不能多于其权重数，而有一层为 {shape}。"
                    f"请把 r 设为至多 {least}，或另选 target_modules。",
                )
            )
        self.set_scaling(1.0)
        self.settings = {"r": config.r}
        values = new_parameter(layer, number, start=nn.init.zeros_ if config.init_weights else nn.init.normal_)
        places = _places(number, self.out_features, self.in_features, config.random_seed, values.device)
        super().__init__(layer, name, {"shira_weight": values, "shira_indices": places})

    def delta(self) -> Tensor:
        """S."""
        values, (rows, columns) = self.part("shira_weight"), self.part("shira_indices").long()
        flat = values.new_zeros(self.out_features * self.in_features)
        S = flat.index_add(0, rows * self.in_features + columns, values * self.s)
        return S.view(self.out_features, self.in_features)

    def check_values(self, tensors: Mapping[str, Tensor], where: str) -> None:
        places = tensors["shira_indices"]
        most = torch.tensor([[self.out_features], [self.in_features]], device=places.device)
        if not ((places >= 0) & (places < most)).all():
            raise AdapterError(
                Bilingual(
                    f"{where}: shira_indices holds places outside of the weight, {tuple(most.flatten().tolist())}. "
                    "The file is damaged, or of another base model.",
                    f"{where}：shira_indices 中有超出权重 {tuple(most.flatten().tolist())} 的位置。"
                    "文件已损坏，或属于另一个基座模型。",
                )
            )


class Shira(LayerMethod[ShiraConfig]):
    """Some of the weights themselves."""

    name = "shira"
    config = ShiraConfig
    learning_rate = 3e-4
    learning_rate_source = Bilingual("PEFT's comparison on MetaMathQA: 3e-4", "PEFT 在 MetaMathQA 上的对比：3e-4")
    trains = Bilingual("one or two weights of a hundred, at places drawn at random", "随机抽取的百分之一二的权重")
    default_targets = VERA_TARGETS

    def attach(self, model: nn.Module, config: ShiraConfig, *, saved: Sequence[str], from_file: bool) -> Parts:
        if config.mask_type != "random" and not from_file:
            raise ConfigError(
                Bilingual(
                    f"mask_type = {config.mask_type!r}: must be 'random'; other masks are read from files alone.",
                    f"mask_type = {config.mask_type!r}：只能为 'random'；其他掩码只能从文件读取。",
                )
            )
        return super().attach(model, config, saved=saved, from_file=from_file)

    def make(self, config: ShiraConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> ShiraLayer:
        return ShiraLayer(config, layer, name)


def _places(number: int, rows: int, columns: int, seed: int | None, device: torch.device) -> Tensor:
    """Places of a matrix, each once, in their order, (2, number): PEFT's for the seed."""
    if device.type == "meta":
        return torch.empty(2, number, dtype=torch.int32, device=device)
    generator = torch.Generator() if seed is None else torch.Generator().manual_seed(seed)
    drawn = torch.randperm(rows * columns, generator=generator, device="cpu")[:number].sort().values
    return torch.stack([drawn // columns, drawn % columns]).to(device, torch.int32)
