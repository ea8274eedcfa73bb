"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021, arXiv:2106.09685).

    y = W x + (alpha / r) B A x        A ~ U(kaiming), B = 0: at the start y = W x exactly

rsLoRA (Kalajdzievski, 2023, arXiv:2312.03732) scales by alpha / sqrt(r) instead.
Shapes: W (O, I), A (R, I), B (O, R); B leading dimensions of the input, I in, O out, R = r.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from siliang.methods.base import LayerConfig, WrappedLayer, trained_dtype
from siliang.ops.lora_linear import lora_linear
from siliang.types import ConfigError, PeftType


@dataclass(kw_only=True)
class LoraConfig(LayerConfig):
    """LoRA's settings, with PEFT's names and defaults.

    Attributes:
        r: Rank of the update.
        target_modules: Which layers: a list of name endings, a regex for the whole name, "all-linear", or None for the
            model type's defaults.
        exclude_modules: Layers left out again: name endings or a regex.
        lora_alpha: Numerator of the scaling.
        lora_dropout: Probability of zeroing an input of A during training.
        fan_in_fan_out: The base weight is stored (in, out). Found by itself for GPT-2's Conv1D; kept for the file.
        bias: Base biases trained along: none, all, or those of the wrapped layers.
        use_rslora: Scale by alpha / sqrt(r).
        init_lora_weights: True: A kaiming uniform, B zero. "gaussian": A normal with deviation 1/r, B zero. False: both
            random, for tests.
        layers_to_transform: Indices of the blocks to tune; None for all.
        layers_pattern: Name of the list that the indices count in ("layers", "h"); None for any.
        rank_pattern: r for layers whose name ends in, or matches, the key.
        alpha_pattern: lora_alpha likewise.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    init_lora_weights: bool | Literal["gaussian"] = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    peft_type: ClassVar[PeftType] = PeftType.LORA
    UNSUPPORTED: ClassVar[dict[str, Any]] = {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "layer_replication": None,
        "loftq_config": {},
        "lora_bias": False,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "runtime_config": {"ephemeral_gpu_offload": False},
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.r, int) or self.r < 1:
            raise ConfigError(f"r = {self.r!r}: the rank must be a whole number of at least 1.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"lora_dropout = {self.lora_dropout!r}: must be at least 0 and less than 1.")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"bias = {self.bias!r}: must be 'none', 'all' or 'lora_only'.")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ConfigError(f"init_lora_weights = {self.init_lora_weights!r}: must be true, false or 'gaussian'.")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError("layers_pattern is set without layers_to_transform: say which layers, or leave both out.")

    def layer_arguments(self, path: str) -> dict[str, Any]:
        """What `LoraLinear.add_adapter` needs for the layer at `path`, the patterns resolved."""
        r = _for_path(self.rank_pattern, path, self.r)
        alpha = _for_path(self.alpha_pattern, path, self.lora_alpha)
        return {
            "r": r,
            "scaling": alpha / math.sqrt(r) if self.use_rslora else alpha / r,
            "dropout_p": self.lora_dropout,
            "init": self.init_lora_weights,
        }


class LoraLinear(WrappedLayer):
    """A linear layer (or GPT-2's Conv1D) with low-rank updates beside it.

    Parameter names are PEFT's: `lora_A.<adapter>.weight` (R, I) and `lora_B.<adapter>.weight` (O, R).
    """

    ADAPTER_ATTRIBUTES = ("lora_A", "lora_B")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.dropout_p: dict[str, float] = {}
        self._transposed = not hasattr(base_layer, "in_features")  # Conv1D keeps its weight (I, O)

    @classmethod
    def supports(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"

    def add_adapter(  # type: ignore[override]
        self, name: str, *, r: int, scaling: float, dropout_p: float = 0.0, init: bool | str = True
    ) -> None:
        """Makes A and B for adapter `name`, beside the base weight: on its device, in fp32 where it is half."""
        weight = self.base_layer.weight
        in_features, out_features = weight.shape if self._transposed else (weight.shape[1], weight.shape[0])
        if hasattr(self.base_layer, "in_features"):  # a quantised weight's own shape is that of its storage
            in_features, out_features = self.base_layer.in_features, self.base_layer.out_features
        place = {"device": weight.device, "dtype": trained_dtype(weight)}
        # skip_init, then our own: nn.Linear would draw, and throw away, random numbers for B
        A: Any = nn.utils.skip_init(nn.Linear, in_features, r, bias=False, **place)
        B: Any = nn.utils.skip_init(nn.Linear, r, out_features, bias=False, **place)
        if init == "gaussian":
            nn.init.normal_(A.weight, std=1 / r)
        else:
            nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(B.weight, a=math.sqrt(5))
        else:
            nn.init.zeros_(B.weight)
        self.lora_A[name], self.lora_B[name] = A, B
        self.scaling[name], self.dropout_p[name] = scaling, dropout_p

    def delete_adapter(self, name: str) -> None:
        if name in self.lora_A:
            del self.lora_A[name], self.lora_B[name], self.scaling[name], self.dropout_p[name]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        for name in self.active:
            if name in self.lora_A and name not in self.merged:
                y = lora_linear(
                    y,
                    x,
                    *self._factors(name),
                    self.scaling[name],
                    dropout_p=self.dropout_p[name],
                    training=self.training,
                )
        return y

    def delta(self, name: str) -> Tensor:
        """scaling * B A, in the layout of the base weight and in A's dtype."""
        A, B = self._factors(name)
        BA = self.scaling[name] * (B @ A)
        return BA.T if self._transposed else BA

    @torch.no_grad()
    def merge(self, name: str) -> None:
        if name in self.lora_A:
            weight = self.base_layer.weight
            # one rounding, at the end: the sum is formed in the wider dtype
            weight.copy_(weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.delta(name))
            self.merged = (*self.merged, name)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_A[name].weight, self.lora_B[name].weight  # type: ignore[return-value]


def _for_path(patterns: Mapping[str, float], path: str, default: float) -> Any:
    """The value of the first pattern that matches the whole of `path` or its ending, as PEFT matches them."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
