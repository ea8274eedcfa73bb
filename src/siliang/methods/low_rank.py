"""What LoRA and its variants share: s B A on a layer, and initializations that move a part of the base weight into B A.

Shapes: W (O, I), A (R, I), B (O, R), b (O,); I in, O out, R rank. On an embedding and a convolution: see there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.layer import Layer, LayerAdapter, trained_dtype
from siliang.methods.lora_initialization import USUAL, Factors, Initialization, not_quantized
from siliang.models.introspect import as_stored, features, is_linear, out_by_in
from siliang.models.quantized import float_weight
from siliang.ops.lora_linear import lora_linear
from siliang.types import ConfigError, MergeError


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """LoRA on one layer.

    Attributes:
        kind: Makes what computes it.
        r: R.
        alpha: lora_alpha.
        scaling: s.
        dropout_p: Probability of zeroing an input of A during training.
        init: The initialization.
        bias: B has a bias b.
        norms_on: Where DoRA's norms are computed when it is made; None for where the layer is.
    """

    kind: MakeLowRank
    r: int
    alpha: float
    scaling: float
    dropout_p: float = 0.0
    init: Initialization = USUAL
    bias: bool = False
    norms_on: torch.device | None = None

    @property
    def settings(self) -> dict[str, object]:
        """What PEFT shows of it on a layer."""
        return {"r": self.r, "lora_alpha": self.alpha, "lora_dropout": nn.Dropout(self.dropout_p)}

    def make(self, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> LowRank:
        """Makes adapter `name` on a layer."""
        return self.kind(layer, name, self)


class LowRank(LayerAdapter):
    """s B A on one layer.

    Attributes:
        residual: W', the base weight less what the initialization moved into B A; None where that leaves it unchanged.
    """

    def __init__(
        self,
        layer: Layer,
        name: str,
        spec: LoraSpec,
        parts: Mapping[str, nn.Module | nn.Parameter] | None = None,
    ) -> None:
        super().__init__(layer, name, parts or {})
        self.set_scaling(spec.scaling)
        self.settings = spec.settings
        self.frozen_b = spec.init.frozen_b
        if self.frozen_b:
            self.B.requires_grad_(False)
        self.residual: nn.Parameter | None = None

    @classmethod
    @abstractmethod
    def supports(cls, layer: nn.Module) -> bool:
        """Whether `layer` is of a kind that this works on."""

    @property
    @abstractmethod
    def A(self) -> Tensor:
        """(R, I)."""

    @property
    @abstractmethod
    def B(self) -> Tensor:
        """(O, R)."""

    def delta(self) -> Tensor:
        """s B A, (O, I), in A's dtype."""
        return self.s * (self.B @ self.A)

    def overrides(self) -> dict[str, nn.Parameter]:
        return {} if self.residual is None else {"weight": self.residual}

    def parameters(self) -> dict[str, nn.Parameter]:
        found = super().parameters()
        return {key: p for key, p in found.items() if p is not self.B} if self.frozen_b else found

    @torch.no_grad()
    def take_out(self, A: Tensor, B: Tensor) -> None:
        """Keeps the base weight less s B A, which the adapter begins with."""
        base, weight = self.layer.base_layer, self.layer.base_parameter("weight")
        W_OI = out_by_in(base, weight).float()
        rest = as_stored(base, W_OI - self.config_scaling * (B.to(W_OI) @ A.to(W_OI)))
        if self.residual is None:
            self._keep_residual(rest)
        else:  # it may be in the model now
            self.residual.copy_(rest)

    def _keep_residual(self, residual: Tensor) -> None:
        """Keeps the base weight that belongs to A and B."""
        dtype = self.layer.base_parameter("weight").dtype
        self.residual = nn.Parameter(residual.to(dtype), requires_grad=False)


# Makes LoRA, or a variant of it, on a layer from the layer, the adapter's name and the spec.
MakeLowRank: TypeAlias = Callable[[Layer, str, LoraSpec], LowRank]


class FactorModules(LowRank):
    """s B A on a layer without a lookup, where A and B are modules of the layer's kind: `lora_A.<adapter>.weight`,
    `lora_B.<adapter>.weight` and `.bias` (O,).

    Attributes:
        dropout_p: The probability of zeroing an input of A during training.
    """

    dropout_p: float = 0.0

    @abstractmethod
    def update(self, x: Tensor, like: Tensor) -> Tensor:
        """s B A x, without b and dropout.

        Args:
            x: The layer's input.
            like: The base layer's output, for the shape and the dtype.
        """

    def per_output(self, values_O: Tensor) -> Tensor:
        """A number for each output, (O,), so that it multiplies the layer's output."""
        return values_O

    @property
    def A(self) -> Tensor:
        return cast(Tensor, self.module("lora_A", nn.Module).weight)

    @property
    def B(self) -> Tensor:
        return cast(Tensor, self.module("lora_B", nn.Module).weight)

    @property
    def b(self) -> Tensor | None:
        return cast(Tensor | None, self.module("lora_B", nn.Module).bias)

    def merged(self) -> dict[str, Tensor]:
        """W + s B A, and b_W + s b."""
        base = self.layer.base_layer
        found = {"weight": as_stored(base, self.sum())}
        if self.b is None:
            return found
        update_O = self.s * self.b
        return found | {"bias": base.bias.to(update_O.dtype) + update_O}

    def sum(self) -> Tensor:
        """W + s B A; in fp32 where W is half, for it is rounded once, at the end."""
        base = self.layer.base_layer
        wide = torch.promote_types(base.weight.dtype, torch.float32)
        return float_weight(base).to(wide) + self.delta()

    def check_merge(self) -> None:
        if self.b is not None and self.layer.base_layer.bias is None:
            raise MergeError(
                Bilingual(
                    "The adapter's lora_bias cannot be merged: the base model's layer has no bias to add it to. "
                    "Keep the adapter, or train it without lora_bias.",
                    "适配器的 lora_bias 无法合并：基座模型的层没有偏置可加。请保留适配器，或训练时不用 lora_bias。",
                )
            )


class LowRankLinear(FactorModules):
    """s B A on a linear layer, or GPT-2's Conv1D: `lora_A.<adapter>.weight` (R, I), `lora_B.<adapter>.weight` (O, R)
    and `.bias` (O,).
    """

    def __init__(self, layer: Layer, name: str, spec: LoraSpec) -> None:
        base, weight = layer.base_layer, layer.base_layer.weight
        in_features, out_features = features(base)
        r = spec.init.rank(spec.r, min(in_features, out_features), str(spec.init.name))
        A = nn.Linear(in_features, r, bias=False, device="meta")
        B = nn.Linear(r, out_features, bias=spec.bias, device="meta")
        draw_factors(A, B, spec, device=weight.device, dtype=trained_dtype(weight))
        super().__init__(layer, name, spec, {"lora_A": A, "lora_B": B})
        self.dropout_p = spec.dropout_p
        if spec.init.of_weight is not None and weight.device.type != "meta":
            self._begin_with(factors_of(spec, base, r))

    @torch.no_grad()
    def _begin_with(self, factors: Factors) -> None:
        """Takes over A and B, and the weight that belongs to them."""
        assert factors.B is not None
        for own, first in ((self.A, factors.A), (self.B, factors.B)):
            own.data = first.to(own.dtype)
        if factors.W is not None:
            self._keep_residual(as_stored(self.layer.base_layer, factors.W))

    @classmethod
    def supports(cls, layer: nn.Module) -> bool:
        return is_linear(layer)

    def update(self, x: Tensor, like: Tensor) -> Tensor:
        return lora_linear(torch.zeros_like(like), x, self.A, self.B, self.s)


@torch.no_grad()
def factors_of(spec: LoraSpec, base: nn.Module, r: int) -> Factors:
    """A, B and W' of a linear layer, or an embedding, that the initialization computes from its weight.

    Raises:
        ConfigError: The weight is quantized, and would be changed.
    """
    init, weight = spec.init, base.get_parameter("weight")
    if init.changes_weight and not weight.is_floating_point():
        raise ConfigError(not_quantized(str(init.name)))
    if isinstance(base, nn.Embedding):
        assert init.of_table is not None
        return init.of_table(weight.detach().float(), r, spec.scaling)
    assert init.of_weight is not None
    return init.of_weight(float_weight(base).detach().float(), r, spec.scaling)


def draw_factors(A: nn.Module, B: nn.Module, spec: LoraSpec, *, device: torch.device, dtype: torch.dtype) -> None:
    """Gives A and B, which are on the meta device, their values: nn.Linear itself would draw others first."""
    for module in (A, B):
        for name, p in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(torch.zeros(p.shape, device=device, dtype=dtype)))
    spec.init.draw_a(A.get_parameter("weight"), spec.r)
    if spec.init.draw_b is not None:
        spec.init.draw_b(B.get_parameter("weight"), spec.r)
