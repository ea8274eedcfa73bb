"""LN tuning: Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning (Zhao et al., 2023,
arXiv:2312.11420).

    y = g * norm(x) + b        g (and b, where the norm has one) are trained, as a copy beside the base model's own

Shapes: g, b (D,).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from siliang.methods.base import LayerConfig, WrappedLayer, trained_dtype
from siliang.methods.targets import LN_TARGETS
from siliang.models.introspect import is_norm
from siliang.types import ConfigError, PeftType


@dataclass(kw_only=True)
class LNTuningConfig(LayerConfig):
    """LN tuning has no settings but which norms: `target_modules`, by default those of the model type."""

    peft_type: ClassVar[PeftType] = PeftType.LN_TUNING
    DEFAULT_TARGETS: ClassVar[dict[str, tuple[str, ...]]] = LN_TARGETS

    def layer_arguments(self, paths: Sequence[str]) -> list[dict[str, Any]]:
        """A norm needs nothing."""
        return [{} for _ in paths]


class TunedNorm(WrappedLayer):
    """A norm with trained copies of itself: `ln_tuning_layers.<adapter>.weight` (D,) and `.bias` (D,)."""

    ADAPTER_ATTRIBUTES = ("ln_tuning_layers",)
    EXCLUSIVE = True

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.ln_tuning_layers = nn.ModuleDict()

    @classmethod
    def supports(cls, layer: nn.Module) -> bool:
        return is_norm(layer)

    def add_adapter(self, name: str) -> None:  # type: ignore[override]
        twin = copy.deepcopy(self.base_layer)
        for p in twin.parameters():
            p.data = p.data.to(trained_dtype(p))
        self.ln_tuning_layers[name] = twin

    @classmethod
    def numbers(cls, layer: nn.Module, **arguments: Any) -> int:
        return sum(p.numel() for p in layer.parameters())

    def adapted(self, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        here = [name for name in names if name in self.ln_tuning_layers]
        if len(here) > 1:
            raise ConfigError(f"Only one LN tuning adapter can be at work at a time, not {', '.join(here)}.")
        if not here:
            return self.base_layer(x, *args, **kwargs)
        norm = self.ln_tuning_layers[here[0]]
        wide = next(norm.parameters()).dtype
        # beside a half-precision model the copy is in fp32: the few numbers of a norm, computed there and cast back
        return norm(x.to(wide) if x.dtype.itemsize < wide.itemsize else x, *args, **kwargs).to(x.dtype)

    def merged_parameters(self, name: str) -> dict[str, Tensor]:
        return {key: p.detach().clone() for key, p in self.ln_tuning_layers[name].named_parameters()}
