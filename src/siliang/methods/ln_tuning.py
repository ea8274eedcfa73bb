"""LN tuning: Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning (Zhao et al., 2023,
arXiv:2312.11420).

    y = g * norm(x) + b        g (and b, where the norm has one) are trained, as a copy of the base model's

As in PEFT other layers may be named too, of any kind: a copy of the layer is trained, and computes in its place.

Shapes: g, b (D,).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from siliang.language import Bilingual
from siliang.methods.config import LayerConfig
from siliang.methods.find_targets import find_targets
from siliang.methods.layer import BaseForward, Layer, LayerAdapter, trained_dtype
from siliang.methods.method import Method, Parts
from siliang.methods.targets import LN_TARGETS
from siliang.models.introspect import is_norm
from siliang.models.quantized import is_quantized
from siliang.types import ConfigError, MergeError, PeftType


@dataclass(kw_only=True)
class LNTuningConfig(LayerConfig):
    """LN tuning has no settings but which layers: `target_modules`, by default the norms of the model type."""

    peft_type: ClassVar[str] = PeftType.LN_TUNING


class LNTuning(Method[LNTuningConfig]):
    """A copy of each chosen norm, or other layer."""

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
        supports = is_norm if config.target_modules is None else _is_single_layer
        layers = find_targets(model, config, supports, defaults=self.default_targets, outside=saved, lenient=from_file)
        return Parts(layers=dict.fromkeys(layers, _make))


def _is_single_layer(module: nn.Module) -> bool:
    """Whether a module has parameters, and all of them itself. A block's copy would compute in the block's place, and
    hooks and other adapters on the block's own layers would do nothing.
    """
    names = [name for name, _ in module.named_parameters()]
    return bool(names) and not any("." in name for name in names)


def _make(layer: Layer, name: str, shared: Mapping[str, Tensor]) -> LayerAdapter:
    """LN tuning on one layer: a copy of it.

    Raises:
        ConfigError: The layer is quantized.
    """
    if is_quantized(layer.base_layer):
        kind = type(layer.base_layer).__name__
        raise ConfigError(
            Bilingual(
                f"LN tuning trains copies of layers, and one is quantized ({kind}), which cannot be trained: name "
                "norms alone, or load the base model without quantization.",
                f"LN tuning 训练层的副本，而有一层已量化（{kind}），无法训练：请只写归一化层，或不量化地加载基座模型。",
            )
        )
    own = copy.deepcopy(layer.base_layer)
    for p in own.parameters():
        p.data = p.data.to(trained_dtype(p))
    return TunedCopy(layer, name, {"ln_tuning_layers": own})


class TunedCopy(LayerAdapter):
    """The layer with parameters of its own, such as `ln_tuning_layers.<adapter>.weight` and `.bias` (D,) of a norm."""

    EXCLUSIVE = True  # the copy computes in the layer's place

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        own = self.module("ln_tuning_layers", nn.Module)
        wide, narrow = (next(m.parameters()).dtype for m in (own, self.layer.base_layer))
        # the copy is in fp32 also on a half-precision model: the input is cast to it and the output back
        if x.is_floating_point():
            x, narrow = x.to(wide) if x.dtype.itemsize < wide.itemsize else x, x.dtype
        y = base_forward.through(own, x)
        return cast(Tensor, tree_map_only(Tensor, lambda t: t.to(narrow) if t.is_floating_point() else t, y))

    def merged(self) -> dict[str, Tensor]:
        return {key: p.detach().clone() for key, p in self.module("ln_tuning_layers", nn.Module).named_parameters()}

    def check_merge(self) -> None:
        own = self.module("ln_tuning_layers", nn.Module)
        if statistics := own.state_dict().keys() - dict(own.named_parameters()).keys():
            raise MergeError(
                Bilingual(
                    f"{type(own).__name__} has statistics of its own ({', '.join(sorted(statistics))}), which are no "
                    "parameters to merge into: use the adapter unmerged.",
                    f"{type(own).__name__} 带有自己的统计量（{'、'.join(sorted(statistics))}），不是可合并的参数："
                    "请不合并地使用该适配器。",
                )
            )
