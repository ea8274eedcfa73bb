"""LoRA on a convolution: nn.Conv1d, nn.Conv2d or nn.Conv3d.

    y = W * x + s B * (A * x)        * convolves; A has the window, stride, padding and dilation of W, B a window of 1

W is one convolution with W + s B A: its window is that of A. Of a convolution in G groups B has the groups and A has
not, as in PEFT: A's R channels are made of all channels, and group g of the outputs reads R / G of them. No weight in
G groups can do that, so it is not merged.

Shapes: W (O, C / G, window), A (R, C, window), B (O, R / G, 1 ...), b (O,); C channels in, O out, R rank.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.layer import BaseForward, Layer, trained_dtype
from siliang.methods.low_rank import FactorModules, LoraSpec, draw_factors
from siliang.models.introspect import apply_weight, is_convolution
from siliang.secrets import short_repr
from siliang.types import ConfigError, MergeError


class LoraConv(FactorModules):
    """LoRA on a convolution."""

    def __init__(self, layer: Layer, name: str, spec: LoraSpec) -> None:
        base: Any = layer.base_layer
        _check(base, spec)
        kind: Any = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(base, kind))
        A = kind(
            base.in_channels,
            spec.r,
            base.kernel_size,
            base.stride,
            base.padding,
            base.dilation,
            bias=False,
            padding_mode=base.padding_mode,
            device="meta",
        )
        B = kind(spec.r, base.out_channels, 1, groups=base.groups, bias=spec.bias, device="meta")
        draw_factors(A, B, spec, device=base.weight.device, dtype=trained_dtype(base.weight))
        super().__init__(layer, name, spec, {"lora_A": A, "lora_B": B})
        self.dropout_p = spec.dropout_p

    @classmethod
    def supports(cls, layer: nn.Module) -> bool:
        return is_convolution(layer)

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        """y = W * x + s B * (A * x) (+ s b)"""
        y = base_forward(x)
        y = y + self.update(F.dropout(x, self.dropout_p, training=self.layer.training), y)
        return y if self.b is None else y + (self.s * self.per_output(self.b)).to(y.dtype)

    def update(self, x: Tensor, like: Tensor) -> Tensor:
        A, B = self.module("lora_A", nn.Module), self.module("lora_B", nn.Module)
        x_R = apply_weight(A, x, self.A.to(x.dtype))
        return (self.s * apply_weight(B, x_R, self.B.to(x.dtype))).to(like.dtype)

    def per_output(self, values_O: Tensor) -> Tensor:
        return values_O.view(-1, *[1] * (self.A.dim() - 2))

    def delta(self) -> Tensor:
        """s B A in the shape of the layer's weight, in A's dtype.

        Raises:
            MergeError: The convolution has groups.
        """
        base = self.layer.base_layer
        if base.groups > 1:
            raise MergeError(
                Bilingual(
                    f"LoRA on a convolution in {base.groups} groups cannot be merged: its update reads all channels, "
                    "and the layer's weight those of one group. Keep the adapter.",
                    f"{base.groups} 组的卷积上的 LoRA 无法合并：它的更新读取所有通道，而该层的权重只读取一组通道。"
                    "请保留适配器。",
                )
            )
        return self.s * (self.B.flatten(1) @ self.A.flatten(1)).view(base.weight.shape)

    def check_merge(self) -> None:
        super().check_merge()
        if self.layer.base_layer.groups > 1:
            self.delta()


def _check(base: Any, spec: LoraSpec) -> None:
    """
    Raises:
        ConfigError: The settings do not go with this convolution.
    """
    if spec.r % base.groups:
        raise ConfigError(
            Bilingual(
                f"r = {spec.r}: must be a multiple of a convolution's groups, and a layer has {base.groups}. Choose "
                "another r for it (rank_pattern), or other target_modules.",
                f"r = {spec.r}：须为卷积组数的倍数，而有一层有 {base.groups} 组。请为它另选 r（rank_pattern），"
                "或另选 target_modules。",
            )
        )
    if not spec.init.on_any_layer:
        raise ConfigError(
            Bilingual(
                f"init_lora_weights = {short_repr(spec.init.name)} does not work on a convolution: use true, false or "
                "'gaussian', or leave it out of target_modules.",
                f"init_lora_weights = {short_repr(spec.init.name)} 不能用于卷积：请用 true、false 或 'gaussian'，"
                "或从 target_modules 中去掉它。",
            )
        )
