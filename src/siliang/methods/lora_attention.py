"""LoRA on nn.MultiheadAttention, which holds the projections of queries, keys and values in one weight.

    in_proj_weight + s B A        out_proj.weight + 2 s B' A'

The attention calls no linear layer: it reads both weights, so the sums are formed before it is called, and rounded
where the weights are half. There is no dropout, for no input of A is seen. PEFT (0.21.2) adds the update of out_proj
twice, in the forward and in the merge, and its files are made with that: so does this. PEFT's gradients are those of
adding it once; these are the function's.

Shapes: in_proj_weight (3 E, E), A (R, E), B (3 E, R); out_proj.weight (E, E), A' (R, E), B' (E, R); E the attention's
width, R rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.computed import WithParameters
from siliang.methods.layer import BaseForward, Layer, LayerAdapter, MakeAdapter, trained_dtype
from siliang.methods.lora_config import LoraConfig
from siliang.methods.low_rank import LoraSpec, LowRank, LowRankLinear, draw_factors
from siliang.models.introspect import is_multihead_attention
from siliang.secrets import short_repr
from siliang.types import ConfigError

OUT = "out_proj"
TWICE = 2  # as PEFT adds the update of out_proj


class LoraInProjection(LowRank):
    """LoRA on an attention's queries, keys and values: `lora_A.<adapter>.weight` (R, E), `lora_B.<adapter>.weight`
    (3 E, R). Its forward computes the attention with `LoraOutProjection` too.
    """

    def __init__(self, layer: Layer, name: str, spec: LoraSpec) -> None:
        base, weight = layer.base_layer, layer.base_layer.in_proj_weight
        A = nn.Linear(base.embed_dim, spec.r, bias=False, device="meta")
        B = nn.Linear(spec.r, 3 * base.embed_dim, bias=False, device="meta")
        draw_factors(A, B, spec, device=weight.device, dtype=trained_dtype(weight))
        super().__init__(layer, name, spec, {"lora_A": A, "lora_B": B})

    @classmethod
    def supports(cls, layer: nn.Module) -> bool:
        return is_multihead_attention(layer)

    @property
    def A(self) -> Tensor:
        return self.module("lora_A", nn.Linear).weight

    @property
    def B(self) -> Tensor:
        return self.module("lora_B", nn.Linear).weight

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        """The attention with both weights' updates, of this and of the other active adapters.

        Args:
            x: The queries.

        Returns:
            What the attention gives: its output, and its weights or None.
        """
        base = self.layer.base_layer
        out: Layer = base.out_proj
        here = [*base_forward.inner, self]
        sums = {
            "in_proj_weight": _plus(here, 1),
            "out_proj.base_layer.weight": _plus([out.adapters[one.name] for one in here], TWICE),
        }
        return base_forward.through(WithParameters(base, sums), x)

    def merged(self) -> dict[str, Tensor]:
        W = self.layer.base_layer.in_proj_weight
        return {"in_proj_weight": W.to(torch.promote_types(W.dtype, torch.float32)) + self.delta()}

    def delta_weight(self) -> Tensor:
        return self.delta()


class LoraOutProjection(LowRankLinear):
    """LoRA on an attention's output: `lora_A.<adapter>.weight` (R, E), `lora_B.<adapter>.weight` (E, R)."""

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        y = base_forward(x)
        return y + TWICE * self.update(x, y)

    def sum(self) -> Tensor:
        return super().sum() + (TWICE - 1) * self.delta()


def on_attention(path: str, attention: nn.Module, spec: LoraSpec, config: LoraConfig) -> dict[str, MakeAdapter]:
    """What LoRA is on an attention and on its out_proj, by path.

    Raises:
        ConfigError: A setting does not work on an attention, or its keys or values have another width.
    """
    settings = {"use_dora": config.use_dora, "lora_bias": config.lora_bias}
    wrong = next((f"{key} = True" for key, value in settings.items() if value), None)
    if not spec.init.on_any_layer:
        wrong = f"init_lora_weights = {short_repr(spec.init.name)}"
    if wrong is not None:
        raise ConfigError(
            Bilingual(
                f"{wrong} does not work on {path}, an nn.MultiheadAttention: leave it out of target_modules, or the "
                "setting at its default.",
                f"{wrong} 不能用于 {path}（nn.MultiheadAttention）：请从 target_modules 中去掉它，"
                "或让该设置保持默认值。",
            )
        )
    if getattr(attention, "in_proj_weight", None) is None:
        raise ConfigError(
            Bilingual(
                f"{path} is an nn.MultiheadAttention with keys or values of another width (kdim, vdim): LoRA is for "
                "those of one width. Leave it out of target_modules.",
                f"{path} 是键或值宽度不同（kdim、vdim）的 nn.MultiheadAttention：LoRA 只用于宽度相同的情形。"
                "请从 target_modules 中去掉它。",
            )
        )
    if config.lora_dropout:
        warnings.warn(
            Bilingual(
                f"lora_dropout has no effect on {path}, an nn.MultiheadAttention.",
                f"lora_dropout 对 {path}（nn.MultiheadAttention）不起作用。",
            ),
            stacklevel=2,
        )
    return {path: spec.make, f"{path}.{OUT}": replace(spec, kind=LoraOutProjection).make}


def to_keys_of_peft(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter as PEFT's files call them, which have an attention's out_proj below `base_layer`."""
    ends = (".lora_A.weight", f".{OUT}.lora_A.weight")
    attentions = [key.removesuffix(ends[1]) for key in tensors if key.endswith(ends[1])]
    attentions = [path for path in attentions if path + ends[0] in tensors]
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        path = next((path for path in attentions if key.startswith(f"{path}.{OUT}.")), None)
        found[key if path is None else f"{path}.base_layer{key.removeprefix(path)}"] = tensor
    return found


def from_keys_of_peft(key: str) -> str:
    """The way back."""
    return key.replace(f".base_layer.{OUT}.", f".{OUT}.")


def _plus(adapters: Sequence[LayerAdapter], times: int) -> Callable[[Tensor], Tensor]:
    """Adds the updates of adapters to a weight."""

    def add(W: Tensor) -> Tensor:
        for adapter in adapters:
            if isinstance(adapter, LowRank):
                W = W + times * adapter.delta()
        return W

    return add
