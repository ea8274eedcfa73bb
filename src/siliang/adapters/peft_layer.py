"""What scripts read and set of a layer with adapters, under the names that PEFT's layers have."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.layer import LayerAdapter
from siliang.models.introspect import features, is_linear


class PeftLayer(nn.Module):
    """A layer with adapters, as PEFT shows it. Settings such as `r` are mappings of the adapters' names to values.

    Attributes:
        base_layer: The layer of the base model.
        active: The adapters that were made the active ones, also while they are disabled.
        disabled: The layer computes without adapters.
        merged: The adapters that are in the base layer's own parameters.
    """

    base_layer: Any  # nn.Linear or a quantized one, nn.Embedding, a norm, a module of experts ...
    active: tuple[str, ...]
    disabled: bool
    merged: tuple[str, ...]
    _adapters: dict[str, LayerAdapter]

    @abstractmethod
    def in_evaluation(self) -> AbstractContextManager[None]:
        """Within the block nothing of the adapters is dropped at random."""

    def get_base_layer(self) -> nn.Module:
        """The layer of the base model."""
        return self.base_layer

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def in_features(self) -> int | None:
        """The base layer's inputs: the channels of a convolution, the rows of an embedding; None of other kinds."""
        return _sizes(self.base_layer)[0]

    @property
    def out_features(self) -> int | None:
        """The outputs of the base layer: channels, the columns of an embedding; None of other kinds."""
        return _sizes(self.base_layer)[1]

    # ---- the adapters ----

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters, those too that this layer does not have."""
        return list(self.active)

    @property
    def active_adapter(self) -> list[str] | str:
        """The active adapter, or a list of several."""
        return self.active[0] if len(self.active) == 1 else list(self.active)

    @property
    def merged_adapters(self) -> list[str]:
        return list(self.merged)

    @property
    def disable_adapters(self) -> bool:
        """Whether the layer computes without adapters."""
        return self.disabled

    # ---- scalings ----

    @property
    def scaling(self) -> MutableMapping[str, float]:
        """The scalings of the adapters that have one; setting one changes what the layer computes.

        Another mapping can take its place, as in PEFT: the one before keeps its values, and can be set again.
        """
        return self.__dict__.setdefault("_scalings", _Scalings(self._adapters))

    @scaling.setter
    def scaling(self, values: Mapping[str, float]) -> None:
        kept = dict(values)
        own = self.scaling
        assert isinstance(own, _Scalings)
        own.leave()
        new = (
            values if isinstance(values, _Scalings) and values.adapters is self._adapters else _Scalings(self._adapters)
        )
        self.__dict__["_scalings"] = new
        new.enter(kept)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Makes the scaling of an adapter `scale` times what its config says."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._adapters[adapter].config_scaling

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scalings of the active adapters."""
        for name in set(self.active) & set(self.scaling):
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scalings of the active adapters; None: they are what their configs say again."""
        for name in set(self.active) & set(self.scaling):
            self.scaling[name] = self._adapters[name].config_scaling if scale is None else self.scaling[name] / scale

    # ---- settings and updates ----

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging an adapter alone adds to the layer's weight, in the form in which that is stored."""
        with self.in_evaluation():
            return self._adapters[adapter].delta_weight()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            adapters: Mapping[str, LayerAdapter] = self.__dict__.get("_adapters", {})
            if name == "token_adapter" and any("token_indices" in one.settings for one in adapters.values()):
                return self  # in PEFT a module of its own, inside the layer, has the rows
            found: dict[str, object] = {}
            for key, adapter in adapters.items():
                for held in (adapter.settings, adapter.shared):
                    if name in held:
                        found[key] = held[name]
            if not found:
                raise
            return found if name != "parameter_name" else next(iter(found.values()))  # the same for all


def _sizes(layer: nn.Module) -> tuple[int | None, int | None]:
    """What goes into a layer and comes out, as PEFT counts it."""
    if is_linear(layer):
        return features(layer)
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return layer.in_channels, layer.out_channels
    if isinstance(layer, nn.MultiheadAttention):
        return layer.embed_dim, 3 * layer.embed_dim
    return None, None


class _Scalings(MutableMapping[str, float]):
    """The scalings of a layer's adapters by name: live, or as they were when another mapping took its place.

    Attributes:
        adapters: The layer's adapters.
    """

    def __init__(self, adapters: Mapping[str, LayerAdapter]) -> None:
        self.adapters = adapters
        self._before: dict[str, float] | None = None

    def leave(self) -> None:
        """Keeps the present values."""
        self._before = dict(self)

    def enter(self, values: Mapping[str, float]) -> None:
        """Makes these values the layer's."""
        self._before = None
        self.update(values)

    def _of(self, name: str) -> LayerAdapter:
        if name not in self.adapters or not self.adapters[name].has_scaling:
            raise KeyError(name)
        return self.adapters[name]

    def __getitem__(self, name: str) -> float:
        return float(self._of(name).s) if self._before is None else self._before[name]

    def __setitem__(self, name: str, value: float) -> None:
        adapter = self._of(name)
        if self._before is not None:
            self._before[name] = float(value)
        elif isinstance(adapter.s, Tensor):  # compiled code reads it
            adapter.s.fill_(value)
        else:
            adapter.s = float(value)

    def __delitem__(self, name: str) -> None:
        raise TypeError(
            Bilingual("A scaling cannot be deleted: delete the adapter.", "不能只删除缩放系数：请删除整个适配器。")
        )

    def __iter__(self) -> Iterator[str]:
        known = (name for name, adapter in self.adapters.items() if adapter.has_scaling)
        return known if self._before is None else iter(self._before)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return repr(dict(self))
