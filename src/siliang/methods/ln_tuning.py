"""LN tuning: Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning (Zhao et al., 2023,
arXiv:2312.11420).

    y = g * norm(x) + b        g (and b, where the norm has one) are trained, as a copy of the base model's

Shapes: g, b (D,).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.config import LayerConfig
from siliang.methods.find_targets import find_targets
from siliang.methods.layer import BaseForward, Layer, LayerAdapter, trained_dtype
from siliang.methods.method import Method, Parts
from siliang.methods.targets import LN_TARGETS
from siliang.models.introspect import is_norm
from siliang.types import PeftType


@dataclass(kw_only=True)
class LNTuningConfig(LayerConfig):
    """LN tuning has no settings but which norms: `target_modules`, by default those of the model type."""

    peft_type: ClassVar[str] = PeftType.LN_TUNING


class LNTuning(Method[LNTuningConfig]):
    """A copy of each chosen norm."""

    name = "ln_tuning"
    config = LNTuningConfig
    learning_rate = 1e-2
    learning_rate_source = Bilingual(
        "measured: 81% on SST-2 after 200 steps; Zhao et al. 2023 give none for language",
        "实测：SST-2 训练 200 步得 81%；Zhao 等 2023 没有给出语言任务的值",
    )
    trains = Bilingual("the norms' weights and biases", "归一化层的权重和偏置")
    default_targets = LN_TARGETS

    def attach(self, model: nn.Module, config: LNTuningConfig, *, saved: Sequence[str], from_file: bool) -> Parts:
        layers = find_targets(model, config, is_norm, defaults=self.default_targets, outside=saved, lenient=from_file)
        return Parts(layers=dict.fromkeys(layers, _make))


def _make(layer: Layer, name: str, shared: Mapping[str, Tensor]) -> LayerAdapter:
    """LN tuning on one norm: a copy of it."""
    own = copy.deepcopy(layer.base_layer)
    for p in own.parameters():
        p.data = p.data.to(trained_dtype(p))
    return TunedNorm(layer, name, {"ln_tuning_layers": own})


class TunedNorm(LayerAdapter):
    """y = g * norm(x) + b, with g and b as `ln_tuning_layers.<adapter>.weight` and `.bias` (D,)."""

    EXCLUSIVE = True  # the copy computes in the norm's place

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        norm = self.module("ln_tuning_layers", nn.Module)
        wide = next(norm.parameters()).dtype
        # the copy is in fp32 also on a half-precision model: the input is cast to it and the output back
        return base_forward.through(norm, x.to(wide) if x.dtype.itemsize < wide.itemsize else x).to(x.dtype)

    def merged(self) -> dict[str, Tensor]:
        return {key: p.detach().clone() for key, p in self.module("ln_tuning_layers", nn.Module).named_parameters()}
