"""A new adapter out of several of LoRA, or of IA3: `add_weighted_adapter`.

linear and its like   A and B are combined for themselves, each with the root of weight times scaling
cat                   A and B of all, one behind the other: exact, of the sum of the ranks
..._svd               the updates s B A are combined, and A and B are the main directions of what comes out
of IA3                the weighted sum of the factors l; of an adapter that lacks a layer, l is 1 there
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from siliang.adapters.adapted_layer import AdaptedLayer
from siliang.adapters.adapter import AttachedAdapter
from siliang.adapters.combine import WAYS, MajoritySign, combine
from siliang.language import Bilingual
from siliang.methods.ia3 import IA3Config
from siliang.methods.layer import LayerAdapter
from siliang.methods.lora_config import LoraConfig
from siliang.methods.low_rank import LowRank
from siliang.methods.tied_ends import TiedHead
from siliang.types import ConfigError, nearest

COMBINATIONS = ("svd", "linear", "cat", *(w for w in WAYS if w != "linear"))
COMBINATIONS += tuple(f"{w}_svd" for w in WAYS if w != "linear")


@dataclass(frozen=True, kw_only=True)
class Combination:
    """How adapters are combined, as `add_weighted_adapter` is asked to.

    Attributes:
        adapters: Their names.
        weights: One for each.
        way: One of `COMBINATIONS`.
        svd_rank: The rank of what comes out; None: the largest of the adapters'.
        svd_clamp: The quantile of magnitudes at which A and B are cut off; None: nowhere.
        density, majority_sign: See `combine`.
    """

    adapters: Sequence[str]
    weights: Sequence[float]
    way: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    density: float | None = None
    majority_sign: MajoritySign = "total"

    def config(self, configs: Sequence[LoraConfig]) -> LoraConfig:
        """The config of what comes out.

        Raises:
            ConfigError: The adapters cannot be combined this way.
        """
        check_one_each(self.adapters, self.weights)
        if self.way not in COMBINATIONS:
            raise ConfigError(
                Bilingual(
                    f"combination_type = {self.way!r}: must be one of {', '.join(COMBINATIONS)}."
                    f"{nearest(self.way, COMBINATIONS)}",
                    f"combination_type = {self.way!r}：只能是 {'、'.join(COMBINATIONS)} 之一。"
                    f"{nearest(self.way, COMBINATIONS).zh}",
                )
            )
        for name, config in zip(self.adapters, configs, strict=True):
            more = ("target_parameters", "trainable_token_indices", "ensure_weight_tying")
            others = (*config.VARIANTS, "lora_bias", *more)
            trained = next((field for field in others if getattr(config, field)), None)
            if field := trained or (f"bias = {config.bias!r}" if config.bias != "none" else None):
                raise ConfigError(
                    Bilingual(
                        f"adapter {name!r} has {field}: only A and B can be combined.",
                        f"适配器 {name!r} 有 {field}：只有 A 和 B 能合成。",
                    )
                )
        ranks = [max(config.r, *config.rank_pattern.values(), 0) for config in configs]
        if self._way in WAYS and len(set(ranks)) > 1:
            raise ConfigError(
                Bilingual(
                    f"{self.way} needs adapters of one rank, and they have {ranks}: use cat or svd.",
                    f"{self.way} 需要秩相同的适配器，而它们的秩是 {ranks}：请用 cat 或 svd。",
                )
            )
        r = sum(ranks) if self._way == "cat" else ranks[0] if self._way in WAYS else self.svd_rank or max(ranks)
        return replace(
            configs[0],
            r=r,
            lora_alpha=r,
            use_rslora=False,
            init_lora_weights=True,
            target_modules=_all_names("target_modules", [config.target_modules for config in configs]),
            rank_pattern={},
            alpha_pattern={},
        )

    @property
    def _way(self) -> str:
        """With one adapter nothing but its weight counts."""
        return "linear" if len(self.adapters) == 1 else self.way

    @torch.no_grad()
    def fill(self, new: LowRank, parts: Sequence[tuple[LowRank, float]]) -> None:
        """Sets A and B of the new adapter on a layer.

        Args:
            parts: The adapters that the layer has, with their weights.

        Raises:
            ConfigError: The layer is a convolution in groups.
        """
        own_A, own_B = new.A, new.B
        if own_B.shape[1] != len(own_A):
            raise ConfigError(
                Bilingual(
                    "LoRA on a convolution in groups cannot be combined: its B and A have no product.",
                    "分组卷积上的 LoRA 无法合成：它的 B 和 A 没有乘积。",
                )
            )
        A, B = self._cat(parts) if self._way == "cat" else self._factors(new, parts)
        own_A.zero_()[: len(A)] = A.view(len(A), *own_A.shape[1:])
        own_B.zero_()[:, : B.shape[1]] = B.view(len(B), -1, *own_B.shape[2:])

    def _cat(self, parts: Sequence[tuple[LowRank, float]]) -> tuple[Tensor, Tensor]:
        found = [(w * one.s * one.A, one.B) for one, w in parts]
        return torch.cat([A for A, _ in found]), torch.cat([B for _, B in found], dim=1)

    def _factors(self, new: LowRank, parts: Sequence[tuple[LowRank, float]]) -> tuple[Tensor, Tensor]:
        def combined(way: str, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
            return combine(way, tensors, weights, density=self.density, majority_sign=self.majority_sign)

        if self._way in WAYS:
            scaled = [w * one.s for one, w in parts]
            roots = [math.sqrt(abs(w)) for w in scaled]
            A = combined(self._way, [one.A for one, _ in parts], _signed(roots, scaled))
            return A, combined(self._way, [one.B for one, _ in parts], roots)
        way = "linear" if self._way == "svd" else self._way.removesuffix("_svd")
        delta = combined(way, [one.delta().flatten(1) for one, _ in parts], [w for _, w in parts])
        return main_directions(delta, len(new.A), clamp=self.svd_clamp)


def check_base_unchanged(name: str, layers: Iterable[object]) -> None:
    """
    Args:
        layers: The adapter's parts on layers.

    Raises:
        ConfigError: A and B belong to a base weight that the initialization has changed: its update is W' + s B A - W.
    """
    if any(isinstance(layer, LowRank) and layer.residual is not None for layer in layers):
        raise ConfigError(
            Bilingual(
                f"adapter {name!r}: its initialization has changed the base weight, which A and B alone lack. Convert "
                "the adapter with save_as_lora, and combine what that writes.",
                f"适配器 {name!r}：它的初始化改动了基座权重，只有 A 和 B 是不完整的。请先用 save_as_lora 转换该适配器，"
                "再合成得到的结果。",
            )
        )


def lora_layers(model: nn.Module) -> list[LowRank]:
    """The LoRA adapters on all layers of a model."""
    return [
        adapter
        for layer in model.modules()
        if isinstance(layer, AdaptedLayer)
        for adapter in layer.adapters.values()
        if isinstance(adapter, LowRank) and not isinstance(adapter, TiedHead)
    ]


def main_directions(delta_OI: Tensor, rank: int, *, clamp: float | None = None) -> tuple[Tensor, Tensor]:
    """(A, B): the best B A of this rank.

    Args:
        clamp: The quantile of their magnitudes at which both are cut off.
    """
    U, S, Vh = torch.linalg.svd(delta_OI.float(), full_matrices=False)
    A, B = Vh[:rank], U[:, :rank] * S[:rank]
    if clamp is not None:
        bound = torch.quantile(torch.cat([B.flatten(), A.flatten()]), clamp)
        A, B = A.clamp(-bound, bound), B.clamp(-bound, bound)
    return A.to(delta_OI.dtype), B.to(delta_OI.dtype)


def _signed(roots: Sequence[float], scaled: Sequence[float]) -> list[float]:
    """A negative weight is A's alone: on both sides it would cancel itself."""
    return [math.copysign(root, w) for root, w in zip(roots, scaled, strict=True)]


def _all_names(field: str, targets: Sequence[list[str] | str | None]) -> list[str] | str:
    """The targets of all.

    Raises:
        ConfigError: Some are names and others an expression.
    """
    if all(isinstance(t, str) for t in targets):
        return "|".join(f"({t})" for t in targets)
    lists = [t for t in targets if isinstance(t, list)]
    if len(lists) < len(targets):
        raise ConfigError(
            Bilingual(
                f"{field}: adapters can be combined where all have names, or all an expression.",
                f"{field}：要合成的适配器须都用名称，或都用表达式。",
            )
        )
    return sorted({name for names in lists for name in names})


def check_one_each(adapters: Sequence[str], weights: Sequence[float]) -> None:
    """
    Raises:
        ConfigError: There is not one weight for each adapter.
    """
    if len(weights) != len(adapters) or not adapters:
        raise ConfigError(
            Bilingual(
                f"adapters and weights: {len(adapters)} and {len(weights)}; give one for each.",
                f"适配器 {len(adapters)} 个，权重 {len(weights)} 个；请为每个适配器给出一个权重。",
            )
        )


def ia3_of_all(configs: Sequence[IA3Config]) -> IA3Config:
    """The config of IA3 on the layers of all."""
    return replace(
        configs[0],
        target_modules=_all_names("target_modules", [config.target_modules for config in configs]),
        feedforward_modules=_all_names("feedforward_modules", [config.feedforward_modules for config in configs]),
    )


@torch.no_grad()
def fill_factors(path: str, new: LayerAdapter, parts: Sequence[tuple[LayerAdapter | None, float]]) -> None:
    """Sets IA3's factors of the new adapter on a layer.

    Args:
        path: Of the layer.
        parts: Of each adapter its part on the layer, None where it has none, and its weight.

    Raises:
        ConfigError: One scales the layer's input, another its output.
    """
    if any(one is not None and type(one) is not type(new) for one, _ in parts):
        raise ConfigError(
            Bilingual(
                f"{path}: some of the adapters scale its input, and others its output (feedforward_modules), which "
                "cannot be combined.",
                f"{path}：有的适配器缩放它的输入，有的缩放输出（feedforward_modules），无法合成。",
            )
        )
    own = new.part("ia3_l")
    own.copy_(
        sum((w * (torch.ones_like(own) if one is None else one.part("ia3_l")) for one, w in parts), start=0 * own)
    )


def loras_of(adapters: Sequence[AttachedAdapter]) -> list[LoraConfig]:
    """The configs of adapters that are to be combined.

    Raises:
        ConfigError: One is no LoRA, or several have a copy of one module.
    """
    loras = [config for adapter in adapters if isinstance(config := adapter.config, LoraConfig)]
    if len(loras) < len(adapters):
        raise ConfigError(
            Bilingual(
                "add_weighted_adapter combines adapters of LoRA, or adapters of IA3, and one of these is of another "
                "method.",
                "add_weighted_adapter 只合成 LoRA 适配器，或只合成 IA3 适配器，而其中一个是别的方法。",
            )
        )
    check_no_copy_twice(adapters)
    return loras


def check_no_copy_twice(adapters: Sequence[AttachedAdapter]) -> None:
    """
    Raises:
        ConfigError: Several adapters that are to be combined have a copy of one module.
    """
    copied = [path for adapter in adapters for path in adapter.parts.modules]
    if twice := next((path for path in copied if copied.count(path) > 1), None):
        raise ConfigError(
            Bilingual(
                f"{twice}: several of the adapters have a copy of it (modules_to_save), and these cannot be combined.",
                f"{twice}：有几个适配器都带有它的副本（modules_to_save），无法合成。",
            )
        )
