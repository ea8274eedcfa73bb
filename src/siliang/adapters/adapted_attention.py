"""An nn.MultiheadAttention with adapters on it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from siliang.adapters.adapted_layer import AdaptedLayer
from siliang.language import Bilingual
from siliang.types import ConfigError


class AdaptedAttention(AdaptedLayer):
    """As `AdaptedLayer`; what modules around an attention ask of it, such as `batch_first`, is the base layer's."""

    # False keeps nn.TransformerEncoderLayer from computing with the base layer's weights, past the adapters
    _qkv_same_embed_dim = False

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        query, *rest = args or (kwargs.pop("query", None),)
        assert isinstance(query, Tensor)
        if self.rows is not None:
            raise ConfigError(
                Bilingual(
                    "adapter_names: an nn.MultiheadAttention computes a batch with one adapter. Use set_adapter.",
                    "adapter_names：nn.MultiheadAttention 只能用一个适配器计算一个批次。请用 set_adapter。",
                )
            )
        return super().forward(query, *rest, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_layer, name)
