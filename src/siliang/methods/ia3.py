"""IA3: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning (Liu et al., 2022,
arXiv:2205.05638).

    y = l * (W x + b)        for keys, values and the like: l scales what comes out
    y = W (l * x) + b        for feed-forward layers: l scales what goes in

l = 1 at the start, so y is the base layer's exactly. Shapes: l (O, 1), or (1, I) for feed-forward layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from siliang.methods.base import LayerConfig, WrappedLayer, trained_dtype
from siliang.methods.targets import IA3_FEEDFORWARD, IA3_TARGETS
from siliang.models.introspect import as_stored, features, is_linear
from siliang.models.quantized import float_weight
from siliang.patterns import find
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

    peft_type: ClassVar[PeftType] = PeftType.IA3
    DEFAULT_TARGETS: ClassVar[dict[str, tuple[str, ...]]] = IA3_TARGETS

    def __post_init__(self) -> None:
        super().__post_init__()
        feedforward, targets = self.feedforward_modules, self.target_modules
        if isinstance(feedforward, list) and isinstance(targets, list) and not set(feedforward) <= set(targets):
            strange = sorted(set(feedforward) - set(targets))
            raise ConfigError(f"feedforward_modules: {', '.join(strange)} is not among target_modules.")

    def use_defaults_of(self, model_type: str | None) -> None:
        """With the default targets come the default feed-forward layers."""
        if self.feedforward_modules is None:
            self.feedforward_modules = list(IA3_FEEDFORWARD.get(model_type or "", ()))

    def layer_arguments(self, paths: Sequence[str]) -> list[dict[str, Any]]:
        """Whether the layer at each path is a feed-forward layer."""
        names = self.feedforward_modules or []
        if isinstance(names, str):
            (found,) = find("feedforward_modules", [names], paths, whole=True)
            feedforward = [groups is not None for groups in found]
        else:
            feedforward = [any(path == name or path.endswith("." + name) for name in names) for path in paths]
        return [{"feedforward": inside, "init": self.init_ia3_weights} for inside in feedforward]


class IA3Linear(WrappedLayer):
    """A linear layer whose output, or input, is scaled: `ia3_l.<adapter>`."""

    ADAPTER_ATTRIBUTES = ("ia3_l",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.ia3_l = nn.ParameterDict()

    @classmethod
    def supports(cls, layer: nn.Module) -> bool:
        return is_linear(layer)

    def add_adapter(self, name: str, *, feedforward: bool, init: bool = True) -> None:  # type: ignore[override]
        weight = self.base_layer.weight
        in_features, out_features = features(self.base_layer)
        shape = (1, in_features) if feedforward else (out_features, 1)
        make = torch.ones if init else torch.randn
        self.ia3_l[name] = nn.Parameter(make(shape, device=weight.device, dtype=trained_dtype(weight)))

    @classmethod
    def numbers(cls, layer: nn.Module, *, feedforward: bool, **arguments: Any) -> int:
        in_features, out_features = features(layer)
        return in_features if feedforward else out_features

    def adapted(self, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scales = [self.ia3_l[name] for name in names if name in self.ia3_l]
        for l_in in (scale for scale in scales if scale.shape[0] == 1):
            x = x * l_in.flatten().to(x.dtype)
        y = self.base_layer(x, *args, **kwargs)
        for l_out in (scale for scale in scales if scale.shape[0] != 1):
            y = y * l_out.flatten().to(y.dtype)
        return y

    def merged_parameters(self, name: str) -> dict[str, Tensor]:
        scale = self.ia3_l[name]
        weight = self.base_layer.weight
        merged_OI = float_weight(self.base_layer).to(torch.promote_types(weight.dtype, torch.float32)) * scale
        found = {"weight": as_stored(self.base_layer, merged_OI)}
        if scale.shape[0] != 1 and self.base_layer.bias is not None:
            found["bias"] = self.base_layer.bias * scale.flatten()
        return found
