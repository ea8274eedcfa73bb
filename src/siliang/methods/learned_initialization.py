"""Initializations of LoRA from data: from what was learned for a layer to the adapter on it, and its files.

Where W' = W - s B A replaces W in the base layer, neither A and B as they began nor W' follow from the base model: they
are kept with the adapter's training state, and what is saved for use is LoRA of twice the rank on W
(lora_conversion.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from siliang.language import Bilingual
from siliang.methods.initialization import InitializationData, keep_initial, take_initial
from siliang.methods.layer import Layer, LayerAdapter, MakeAdapter
from siliang.methods.lora_config import LoraConfig
from siliang.methods.lora_initialization import Factors, Initialization, TunedLayers, check_rank, not_quantized
from siliang.methods.lora_initializations import INITIALIZATIONS
from siliang.methods.low_rank import LowRank, LowRankLinear
from siliang.methods.method import Adapter
from siliang.models.introspect import features, is_linear
from siliang.models.quantized import is_quantized
from siliang.ops.stored import is_fake
from siliang.types import AdapterError, ConfigError

SIDES = ("lora_A", "lora_B")


@dataclass(frozen=True)
class LearnedFactors:
    """What was learned for a layer.

    Attributes:
        init: The initialization.
        factors: A and B, on the CPU.
    """

    init: bool | str
    factors: Factors


# ---- learning it ----


def tuned_layers(adapter: Adapter[LoraConfig]) -> TunedLayers:
    """The linear layers that an adapter is on."""
    linear = _low_rank(adapter)
    return TunedLayers(
        {path: one.layer.base_layer for path, one in linear},
        {path: len(one.A) for path, one in linear},
        {path: one.config_scaling for path, one in linear},
    )


def plain(config: LoraConfig) -> LoraConfig:
    """The same with the usual initialization, which leaves the model as it is."""
    unset = {row.settings.field: None for row in INITIALIZATIONS.values() if row.settings and row.from_data}
    return dataclasses.replace(config, init_lora_weights=True, **unset)


def learn(model: nn.Module, config: LoraConfig, adapter: Adapter[LoraConfig], data: InitializationData) -> LoraConfig:
    """Learns the initialization of an adapter, and keeps it for the next one on `model`.

    Args:
        adapter: One on the same layers.

    Returns:
        The next one's config.
    """
    row, tuned = config.initialization, tuned_layers(adapter)
    assert row.from_data is not None
    check_weights(row, tuned)
    found = row.from_data.learn(model, tuned, config.initialization_settings, data)
    return keep(config, adapter.layers, found)


def keep(config: LoraConfig, adapters: Mapping[str, LayerAdapter], found: Mapping[str, Factors]) -> LoraConfig:
    """Keeps what was learned for each layer; the config of the adapter that takes it.

    Args:
        adapters: Those of the adapter that is on the layers now, by path.
        found: The factors of each layer.
    """
    for path, factors in found.items():
        if len(factors.A):
            on_cpu = Factors(factors.A.cpu(), None if factors.B is None else factors.B.cpu())
            keep_initial(adapters[path].layer.base_layer, LearnedFactors(config.initialization.name, on_cpu))
    learned = config.initialization.from_data
    if learned is None or learned.redistributes is None:
        return config
    follows = learned.redistributes(config.initialization_settings)
    return _with_ranks(config, adapters, {path: len(one.A) for path, one in found.items()}, alpha_follows=follows)


def _with_ranks(
    config: LoraConfig, adapters: Mapping[str, LayerAdapter], found: Mapping[str, int], *, alpha_follows: bool
) -> LoraConfig:
    """The config with the ranks that were found for layers, of which 0 takes a layer out."""
    targets: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, one in adapters.items():
        if not isinstance(one, LowRank):
            continue
        alpha, r = float(str(one.settings["lora_alpha"])), len(one.A)
        now = found.get(path, r)
        if not now:
            continue
        targets.append(path)
        if now != r and alpha_follows:
            alpha *= now / r
        if now != config.r:
            ranks[path] = now
        if alpha != config.lora_alpha:
            alphas[path] = alpha
    return dataclasses.replace(config, target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas)


def check_weights(row: Initialization, tuned: TunedLayers) -> None:
    """
    Raises:
        ConfigError: The weights, which the initialization changes, are quantized, or too small for it.
    """
    if not row.changes_weight:
        return
    if any(map(is_quantized, tuned.layers.values())):
        raise ConfigError(not_quantized(str(row.name)))
    for path, layer in tuned.layers.items():
        check_rank(str(row.name), tuned.ranks[path], min(features(layer)))


def learning_bytes(adapter: Adapter[LoraConfig]) -> int:
    """Memory that learning its initialization takes beside the model and a batch."""
    learned = adapter.config.initialization.from_data
    return 0 if learned is None else learned.bytes(tuned_layers(adapter))


# ---- the adapter that takes it ----


def learned_for(layer: nn.Module, path: str, config: LoraConfig) -> Factors | None:
    """The factors that were kept for a new adapter, which is the only one to have them.

    Raises:
        ConfigError: There must be such, and there are none.
    """
    row, found = config.initialization, take_initial(layer)
    if isinstance(found, LearnedFactors) and found.init == row.name:
        return found.factors
    if not row.state_needed or not is_linear(layer):
        return None
    if is_fake(layer.weight) or layer.weight.is_meta:  # of a plan or a check: the sizes count
        return None
    assert row.from_data is not None
    raise ConfigError(
        Bilingual(
            f"init_lora_weights = {row.name!r}: nothing was learned from data for {path}. Call "
            f"{row.from_data.call}(model, config, ...) before the adapter is attached (`siliang train` does it by "
            "itself).",
            f"init_lora_weights = {row.name!r}：没有为 {path} 从数据中学到初始值。请在接上适配器之前调用 "
            f"{row.from_data.call}(model, config, ...)（`siliang train` 会自动完成）。",
        )
    )


def initialized(make: MakeAdapter, factors: Factors | None, row: Initialization) -> MakeAdapter:
    """Makes an adapter that begins with what was learned; of a plan, one that only has the same size."""
    if row.from_data is None:
        return make

    def make_initialized(layer: Layer, name: str, shared: Mapping[str, Tensor]) -> LayerAdapter:
        adapter = make(layer, name, shared)
        if isinstance(adapter, LowRankLinear) and factors is not None:
            put(adapter, factors)
        elif isinstance(adapter, LowRankLinear) and isinstance(adapter.A, FakeTensor) and row.state_needed:
            put(adapter, Factors(adapter.A.detach(), adapter.B.detach()))
        return adapter

    return make_initialized


@torch.no_grad()
def put(adapter: LowRank, factors: Factors) -> None:
    """Gives an adapter its factors, and its layer the weight without them.

    Raises:
        ConfigError: They were learned for another rank.
    """
    A, B = factors.A, factors.B
    if A.shape != adapter.A.shape:
        raise ConfigError(
            Bilingual(
                f"The initialization was learned for r = {len(A)}, and the adapter has r = {len(adapter.A)}: use one "
                "config.",
                f"初始值是按 r = {len(A)} 学到的，而适配器的 r = {len(adapter.A)}：请使用同一个配置。",
            )
        )
    adapter.A.copy_(A)
    if B is not None:
        adapter.B.copy_(B)
        adapter.take_out(adapter.A, adapter.B)


# ---- keeping it with the adapter ----


def state_of(learned: Mapping[str, Factors]) -> dict[str, Tensor]:
    """What an adapter keeps of its initialization, by layer: A and B, if a part of the weight went into them."""
    found: dict[str, Tensor] = {}
    for path, factors in learned.items():
        if factors.B is not None:
            sides = zip(SIDES, (factors.A, factors.B), strict=True)
            found |= {f"start.{path}.{side}": t.clone() for side, t in sides}
    return found


def check_state(adapter: Adapter[LoraConfig], state: Mapping[str, Tensor], source: str) -> None:
    """
    Raises:
        AdapterError: An adapter's files lack its initial A and B, without which its base weight is not known.
    """
    init = adapter.config.init_lora_weights
    for path, one in _low_rank(adapter):
        for side, own in zip(SIDES, (one.A, one.B), strict=True):
            found = state.get(f"start.{path}.{side}")
            if found is None:
                raise AdapterError(
                    Bilingual(
                        f"{source}: init_lora_weights = {init!r} changed the base model's weights by data that the "
                        "files do not hold. Let PEFT convert it: "
                        "save_pretrained(path_initial_model_for_weight_conversion=...).",
                        f"{source}：init_lora_weights = {init!r} 曾按数据改动基座模型的权重，而文件中没有这些数据。"
                        "请用 PEFT 转换：save_pretrained(path_initial_model_for_weight_conversion=...)。",
                    )
                )
            if found.shape != own.shape or not found.is_floating_point():
                raise AdapterError(
                    Bilingual(
                        f"{source}: start.{path}.{side} has shape {tuple(found.shape)}, the adapter needs "
                        f"{tuple(own.shape)}.",
                        f"{source}：start.{path}.{side} 的形状是 {tuple(found.shape)}，适配器需要 {tuple(own.shape)}。",
                    )
                )


def restore(adapter: Adapter[LoraConfig]) -> None:
    """Takes the initial factors out of the base weights of an adapter that was loaded."""
    for path, one in _low_rank(adapter):
        one.take_out(*(adapter.state[f"start.{path}.{side}"] for side in SIDES))


def initial_tensors(adapter: Adapter[LoraConfig]) -> dict[str, Tensor]:
    """A and B as they began, by their keys in an adapter's file; zeros where the weight is as it was."""
    return {
        f"base_model.model.{path}.{key}": adapter.state.get(f"start.{path}.{key.removesuffix('.weight')}", t * 0)
        for path, one in adapter.layers.items()
        for key, t in one.tensors().items()
    }


def _low_rank(adapter: Adapter[LoraConfig]) -> Iterable[tuple[str, LowRankLinear]]:
    return [(path, one) for path, one in adapter.layers.items() if isinstance(one, LowRankLinear)]
