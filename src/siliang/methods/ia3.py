"""IA3: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning (Liu et al., 2022,
arXiv:2205.05638).

    y = l * (W x + b)        for keys, values and the like: l scales what comes out
    y = W (l * x) + b        for feed-forward layers: l scales what goes in

l = 1 at the start, so y is the base layer's exactly. Shapes: l (O, 1), or (1, I) for feed-forward layers; on
convolutions (1, O, 1, 1) or (1, I, 1, 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.config import LayerConfig
from siliang.methods.find_targets import find_targets
from siliang.methods.layer import BaseForward, Layer, LayerAdapter, trained_dtype
from siliang.methods.method import Method, Parts
from siliang.methods.targets import IA3_FEEDFORWARD, IA3_TARGETS
from siliang.models.introspect import as_stored, features, is_convolution, is_linear
from siliang.models.quantized import float_weight
from siliang.module_paths import ends_with, matching_paths
from siliang.types import ConfigError, PeftType


@dataclass(kw_only=True)
class IA3Config(LayerConfig):
    """IA3's settings, with PEFT's names and defaults.

    Attributes:
        feedforward_modules: Those of the targets whose input is scaled: name endings or a regex. None with
            target_modules None: the model type's defaults.
        fan_in_fan_out: The base weight is stored (in, out). Found by itself for GPT-2's Conv1D; kept for the file.
        init_ia3_weights: Start from ones. False: from random numbers, for tests.
    """

    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    peft_type: ClassVar[str] = PeftType.IA3

    def __post_init__(self) -> None:
        super().__post_init__()
        feedforward, targets = self.feedforward_modules, self.target_modules
        if isinstance(feedforward, list) and isinstance(targets, list) and not set(feedforward) <= set(targets):
            unknown = sorted(set(feedforward) - set(targets))
            raise ConfigError(
                Bilingual(
                    f"feedforward_modules: {', '.join(unknown)} is not among target_modules.",
                    f"feedforward_modules：{'、'.join(unknown)} 不在 target_modules 之中。",
                )
            )


class IA3(Method[IA3Config]):
    """One factor for each output, or input, of the chosen linear layers and convolutions."""

    name = "ia3"
    config = IA3Config
    learning_rate = 1e-2
    learning_rate_source = Bilingual(
        "measured: 82% on SST-2 after 200 steps, 72% with the 3e-3 of Liu et al. 2022, section 3.5",
        "实测：SST-2 训练 200 步得 82%；用 Liu 等 2022 第 3.5 节的 3e-3 得 72%",
    )
    trains = Bilingual("one factor for each key, value and feed-forward unit", "键、值和前馈单元各一个缩放因子")
    default_targets = IA3_TARGETS

    def attach(self, model: nn.Module, config: IA3Config, *, saved: Sequence[str], from_file: bool) -> Parts:
        named = {"feedforward_modules": config.feedforward_modules}
        layers = find_targets(
            model,
            config,
            _supports,
            defaults=self.default_targets,
            outside=saved,
            lenient=from_file,
            also_named=named,
        )
        if config.feedforward_modules is None:
            found, targets = IA3_FEEDFORWARD.find(model), config.target_modules
            named = targets if isinstance(targets, list) else found.names
            config.feedforward_modules = [n for n in named if any(ends_with(path, n) for path in found.paths)]
        feedforward = set(matching_paths("feedforward_modules", layers, config.feedforward_modules))
        ones = config.init_ia3_weights
        return Parts(layers={path: partial(_make, path in feedforward, ones) for path in layers})


def _supports(layer: nn.Module) -> bool:
    """PEFT has it on these convolutions too."""
    return is_linear(layer) or (is_convolution(layer) and isinstance(layer, nn.Conv2d | nn.Conv3d))


def _make(feedforward: bool, ones: bool, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> LayerAdapter:
    """IA3 on one layer.

    Args:
        feedforward: The input is scaled, not the output.
        ones: Start from ones, not at random.
    """
    base, weight = layer.base_layer, layer.base_layer.weight
    if is_convolution(base):
        places = [1] * (weight.dim() - 2)
        shape = (1, base.in_channels if feedforward else base.out_channels, *places)
    else:
        in_features, out_features = features(base)
        shape = (1, in_features) if feedforward else (out_features, 1)
    start = torch.ones if ones else torch.randn
    factors = start(shape, device=weight.device, dtype=trained_dtype(weight))
    kind = IA3Input if feedforward else IA3Output
    return kind(layer, name, {"ia3_l": nn.Parameter(factors)})


class IA3Output(LayerAdapter):
    """y = l * (W x + b), with l as `ia3_l.<adapter>` (O, 1), on a convolution (1, O, 1, 1)."""

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        y = base_forward(x)
        return y * _each(self, y)

    def merged(self) -> dict[str, Tensor]:
        l = self.part("ia3_l")  # noqa: E741, the equation's letter
        found = {"weight": _scaled(self.layer, l.transpose(0, 1) if is_convolution(self.layer.base_layer) else l)}
        bias = self.layer.base_layer.bias
        return found if bias is None else found | {"bias": bias * l.flatten()}


class IA3Input(LayerAdapter):
    """y = W (l * x) + b, with l as `ia3_l.<adapter>` (1, I), on a convolution (1, I, 1, 1)."""

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        return base_forward(x * _each(self, x))

    def merged(self) -> dict[str, Tensor]:
        base, l = self.layer.base_layer, self.part("ia3_l")  # noqa: E741, the equation's letter
        if is_convolution(base):  # each group of outputs reads its own inputs
            l = l.unflatten(1, (base.groups, -1))[0].repeat_interleave(base.out_channels // base.groups, 0)  # noqa: E741
        return {"weight": _scaled(self.layer, l)}


def _each(adapter: LayerAdapter, values: Tensor) -> Tensor:
    """l, so that it multiplies `values`: the last dimension of a linear layer's, the channels of a convolution's."""
    factors = adapter.part("ia3_l")
    return (factors[0] if is_convolution(adapter.layer.base_layer) else factors.flatten()).to(values.dtype)


def _scaled(layer: Layer, factors: Tensor) -> Tensor:
    """The base weight times l, as it is stored; in fp32 where it is half, for it is rounded once, at the end."""
    base = layer.base_layer
    wide = torch.promote_types(base.weight.dtype, torch.float32)
    return as_stored(base, float_weight(base).to(wide) * factors)
