"""What LoRA and its variants share: s B A on a layer, and starts that move a part of the base weight into B A.

Shapes: W (O, I), A (R, I), B (O, R), b (O,); I in, O out, R rank. On an embedding and a convolution: see there.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.layer import Layer, LayerAdapter, trained_dtype
from siliang.methods.lora_init import RESIDUAL_STARTS, check_rank, initialize, minor_directions, orthogonal
from siliang.models.introspect import as_stored, features, is_linear, out_by_in
from siliang.models.quantized import float_weight
from siliang.ops.lora_linear import lora_linear
from siliang.types import MergeError

STARTS = (True, False, "gaussian")  # that need nothing of the weight but its shape


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """LoRA on one layer.

    Attributes:
        kind: Makes what computes it.
        r: R.
        alpha: lora_alpha.
        scaling: s.
        dropout_p: Probability of zeroing an input of A during training.
        init: As `init_lora_weights`.
        bias: B has a bias b.
        bits, iterations: Of LoftQ.
        frozen_b: B is not trained, as MiCA has it.
        norms_on: Where DoRA's norms are computed at the start; None for where the layer is.
    """

    kind: MakeLowRank
    r: int
    alpha: float
    scaling: float
    dropout_p: float = 0.0
    init: bool | str = True
    bias: bool = False
    bits: int = 4
    iterations: int = 1
    frozen_b: bool = False
    norms_on: torch.device | None = None

    @property
    def settings(self) -> dict[str, object]:
        """What PEFT shows of it on a layer."""
        return {"r": self.r, "lora_alpha": self.alpha, "lora_dropout": nn.Dropout(self.dropout_p)}

    @property
    def has_residual(self) -> bool:
        """Whether the start changes the base weight."""
        return isinstance(self.init, str) and self.init.startswith(RESIDUAL_STARTS)

    def make(self, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> LowRank:
        """Makes adapter `name` on a layer."""
        return self.kind(layer, name, self)


class LowRank(LayerAdapter):
    """s B A on one layer.

    Attributes:
        residual: The base weight less what the start moved into B A; None where the start leaves it unchanged.
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
        self.frozen_b = spec.frozen_b
        if spec.frozen_b:
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
        """Keeps the base weight less s B A, which has become the adapter's start."""
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
        directions = min(in_features, out_features)
        if spec.init == "mica" or (isinstance(spec.init, str) and spec.init.startswith("pissa_niter")):
            check_rank(str(spec.init), spec.r, directions)
        r = min(spec.r, directions) if spec.has_residual else spec.r  # a weight has no more directions to take
        A = nn.Linear(in_features, r, bias=False, device="meta")
        B = nn.Linear(r, out_features, bias=spec.bias, device="meta")
        dtype = trained_dtype(weight)
        start_factors(A, B, spec, device=weight.device, dtype=dtype)
        if spec.init == "orthogonal":
            start_A, start_B = orthogonal(r, in_features, out_features, device=weight.device)
            A.weight.data, B.weight.data = start_A.to(dtype), start_B.to(dtype)
        elif spec.init == "mica":
            nn.init.zeros_(A.weight)
            if weight.device.type != "meta":
                B.weight.data = minor_directions(float_weight(base), r).to(dtype)
        super().__init__(layer, name, spec, {"lora_A": A, "lora_B": B})
        self.dropout_p = spec.dropout_p
        if spec.has_residual and weight.device.type != "meta":
            W_OI = out_by_in(base, layer.base_parameter("weight"))
            A.weight.data, B.weight.data, residual = initialize(
                str(spec.init), W_OI, r=r, scaling=spec.scaling, bits=spec.bits, iterations=spec.iterations
            )
            self._keep_residual(as_stored(base, residual))

    @classmethod
    def supports(cls, layer: nn.Module) -> bool:
        return is_linear(layer)

    def update(self, x: Tensor, like: Tensor) -> Tensor:
        return lora_linear(torch.zeros_like(like), x, self.A, self.B, self.s)


def start_factors(A: nn.Module, B: nn.Module, spec: LoraSpec, *, device: torch.device, dtype: torch.dtype) -> None:
    """Gives A and B, which are on the meta device, their values: nn.Linear itself would draw others first."""
    for module in (A, B):
        for name, p in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(torch.zeros(p.shape, device=device, dtype=dtype)))
    weight_A, weight_B = A.get_parameter("weight"), B.get_parameter("weight")
    if spec.init == "gaussian":
        nn.init.normal_(weight_A, std=1 / spec.r)
    else:
        nn.init.kaiming_uniform_(weight_A, a=math.sqrt(5))
    if spec.init is False:
        nn.init.kaiming_uniform_(weight_B, a=math.sqrt(5))
