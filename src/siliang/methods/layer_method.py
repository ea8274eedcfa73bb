"""The methods that put an adapter on each of the layers that a config names. What a method of this kind adds is how one
layer's adapter is made, and what the layers share.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, TypeVar

from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.bitfit import chosen_biases
from siliang.methods.blocks import Blocks
from siliang.methods.config import LayerConfig
from siliang.methods.find_targets import find_targets
from siliang.methods.layer import Layer, LayerAdapter, MakeAdapter
from siliang.methods.layer_patterns import ENDINGS, LayerPatterns
from siliang.methods.method import Method, Parts, SharedSpec
from siliang.methods.targets import LORA_TARGETS
from siliang.models.introspect import is_linear
from siliang.types import ConfigError

SIDES_ZH = {"inputs": "输入", "outputs": "输出", "weights": "权重"}


@dataclass(kw_only=True)
class BlocksConfig(LayerConfig):
    """The config of a method that may work on some of the model's numbered layers (its blocks).

    Attributes:
        layers_to_transform: Indices of the blocks to tune; None for all.
        layers_pattern: Name of the list that the indices count in ("layers", "h"); None for any.
    """

    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                Bilingual(
                    "layers_pattern is set without layers_to_transform: name the layers, or leave both out.",
                    "设置了 layers_pattern 却没有 layers_to_transform：请写出层号，或两者都去掉。",
                )
            )
        targets = self.target_modules
        if self.layers_to_transform is not None and isinstance(targets, str) and targets.lower() != "all-linear":
            raise ConfigError(
                Bilingual(
                    "layers_to_transform is for target_modules by name: with a regular expression, as here, write the "
                    "layers' numbers into it.",
                    "layers_to_transform 用于按名称给出的 target_modules：这里是正则表达式，请把层号写进表达式。",
                )
            )


B = TypeVar("B", bound=LayerConfig)


class LayerMethod(Method[B]):
    """A method whose adapter on a layer follows from the config and the layer.

    Attributes:
        patterns: The settings that a layer may have a value of its own for, by the field that holds those by name, such
            as {"rank_pattern": "r"}.
        patterns_around: What makes an expression for a layer's path of a name there.
    """

    patterns: ClassVar[Mapping[str, str]] = {}
    patterns_around: ClassVar[tuple[str, str]] = ENDINGS
    default_targets = LORA_TARGETS

    @abstractmethod
    def make(self, config: B, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> LayerAdapter:
        """Makes adapter `name` on a layer.

        Args:
            config: The layer's own: with the values that patterns have for it.
            shared: The tensors of `shared`.
        """

    def supports(self, layer: nn.Module) -> bool:
        """Whether the method works on layers of this kind."""
        return is_linear(layer)

    def shared(self, config: B, layers: Mapping[str, nn.Module]) -> Mapping[str, SharedSpec]:
        """The tensors that all layers of an adapter share.

        Args:
            layers: The layers that it is on, by path.
        """
        return {}

    def attach(self, model: nn.Module, config: B, *, saved: Sequence[str], from_file: bool) -> Parts:
        blocks = Blocks.of(getattr(config, "layers_to_transform", None), getattr(config, "layers_pattern", None))
        paths = find_targets(
            model,
            config,
            self.supports,
            defaults=self.default_targets,
            outside=saved,
            lenient=from_file,
            blocks=blocks,
        )
        own: dict[str, B] = dict.fromkeys(paths, config)
        for field, setting in self.patterns.items():
            if getattr(config, field) is None:
                continue
            found = LayerPatterns(field, getattr(config, field), paths, self.patterns_around)
            if not from_file:
                found.check_effect()
            setattr(config, field, found.in_any_order())
            for path, value in found.values.items():
                own[path] = copy.copy(own[path])
                setattr(own[path], setting, value)
        layers: dict[str, MakeAdapter] = {path: partial(self.make, own[path]) for path in paths}
        return Parts(
            layers=layers,
            parameters=chosen_biases(model, getattr(config, "bias", "none"), paths, outside=saved),
            shared=self.shared(config, {path: model.get_submodule(path) for path in paths}),
        )


def check_fits(key: str, value: int, size: int, side: Literal["inputs", "outputs", "weights"]) -> None:
    """
    Args:
        key: A setting.
        size: How many inputs, outputs or weights, as `side` has it, the layer has.

    Raises:
        ConfigError: The setting's value is more.
    """
    if value > size:
        side_zh = SIDES_ZH[side]
        raise ConfigError(
            Bilingual(
                f"{key} = {value}: must be at most the {side} of each layer, and one has {size}. Choose less, or other "
                "target_modules.",
                f"{key} = {value}：至多为每层的{side_zh}数，而有一层为 {size}。请减小，或另选 target_modules。",
            )
        )


def check_divides(key: str, value: int, size: int, side: Literal["inputs", "outputs"]) -> None:
    """As `check_fits`.

    Raises:
        ConfigError: The setting's value does not divide the size.
    """
    if size % value:
        side_zh = SIDES_ZH[side]
        raise ConfigError(
            Bilingual(
                f"{key} = {value}: must divide the {side} of each layer, and one has {size}. Choose another number, or "
                "other target_modules.",
                f"{key} = {value}：须整除每层的{side_zh}数，而有一层为 {size}。请另选数值或 target_modules。",
            )
        )


def check_ranks(field: str, ranks: Mapping[str, int], *, most: int = LayerConfig.MOST) -> None:
    """
    Args:
        field: A setting that holds ranks, or other sizes, by the layers' names.

    Raises:
        ConfigError: One is not a size.
    """
    if wrong := [(key, r) for key, r in ranks.items() if not 1 <= r <= most]:
        key, r = wrong[0]
        raise ConfigError(
            Bilingual(
                f"{field}: {key!r} = {r}: must be 1 to {most:,}.", f"{field}：{key!r} = {r}：须在 1 到 {most:,} 之间。"
            )
        )


def check_seed(name: str, seed: int | None) -> None:
    """
    Raises:
        ConfigError: A setting is no seed of PyTorch.
    """
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ConfigError(
            Bilingual(f"{name} = {seed}: must fit in 64 bits.", f"{name} = {seed}：须在 64 位整数范围内。")
        )


def check_one_set(first: str, one: int, second: str, other: int) -> None:
    """
    Raises:
        ConfigError: Not exactly one of two settings is set, which are the size and the number of a layer's blocks.
    """
    if min(one, other) != 0 or max(one, other) < 1:
        raise ConfigError(
            Bilingual(
                f"{first} = {one} and {second} = {other}: set one of them, and the other to 0 "
                "(their product is the layer's width).",
                f"{first} = {one} 和 {second} = {other}：请设置其中一个，另一个设为 0（两者之积是层的宽度）。",
            )
        )
