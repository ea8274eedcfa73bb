"""VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al., 2024, arXiv:2310.11454).

    y = W x + b * B (d * A x)        A and B random, frozen, the same for all layers;  b = 0 at the start

A layer takes the first columns of A and the first rows of B, as many as it has inputs and outputs.

Shapes: W (O, I), A (R, largest I), B (largest O, R), d (R,), b (O,); I in, O out, R = r.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.additive import Additive
from siliang.methods.layer import Layer, new_parameter
from siliang.methods.layer_method import BlocksConfig, LayerMethod, check_seed
from siliang.methods.method import SharedSpec
from siliang.methods.targets import VERA_TARGETS
from siliang.models.introspect import features
from siliang.ops.vera_linear import vera_linear
from siliang.types import PeftType


@dataclass(kw_only=True)
class ProjectionConfig(BlocksConfig):
    """The settings of a method whose random projections all layers share.

    Attributes:
        projection_prng_key: Seed of the projections.
        save_projection: The file holds them. False: they are made from the seed again, for which a new release of
            PyTorch may draw other numbers.
        fan_in_fan_out: The base weight is stored (in, out). Found by itself for GPT-2's Conv1D; kept for the file.
        bias: The base biases that are trained too: "none", "all", or of the tuned layers ("vera_only").
        init_weights: The update is zero at the start. False: random, for tests.
    """

    projection_prng_key: int = 0
    save_projection: bool = True
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "vera_only"] = "none"
    init_weights: bool = True

    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("r",)
    NOT_IN_PEFT: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed("projection_prng_key", self.projection_prng_key)


@dataclass(kw_only=True)
class VeraConfig(ProjectionConfig):
    """VeRA's settings, with PEFT's names and defaults.

    Attributes:
        r: Rank. It costs little: a layer trains r + O numbers.
        vera_dropout: Probability of zeroing an input of A during training.
        d_initial: What d is at the start.
    """

    r: int = 256
    vera_dropout: float = 0.0
    d_initial: float = 0.1

    peft_type: ClassVar[str] = PeftType.VERA
    PROBABILITIES: ClassVar[tuple[str, ...]] = ("vera_dropout",)


class VeraLayer(Additive):
    """VeRA on a linear layer: `vera_lambda_b.<adapter>` (O,) and `vera_lambda_d.<adapter>` (R,)."""

    def __init__(self, config: VeraConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> None:
        self.in_features, self.out_features = features(layer.base_layer)
        start_b, start_d = nn.init.ones_, nn.init.normal_
        if config.init_weights:
            start_b, start_d = nn.init.zeros_, partial(nn.init.constant_, val=config.d_initial)
        b_O, d_R = new_parameter(layer, self.out_features, start=start_b), new_parameter(layer, config.r, start=start_d)
        super().__init__(layer, name, {"vera_lambda_b": b_O, "vera_lambda_d": d_R})
        self.settings, self.dropout_p = {"r": config.r}, config.vera_dropout
        self.shared = shared

    def projections(self) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R) of this layer."""
        device = self.part("vera_lambda_d").device
        A, B = (self.shared[name].to(device) for name in ("vera_A", "vera_B"))
        return A[:, : self.in_features], B[: self.out_features]

    def delta(self) -> Tensor:
        """diag(b) B diag(d) A, (O, I)."""
        b, d = self.part("vera_lambda_b"), self.part("vera_lambda_d")
        A, B = (t.to(d.dtype) for t in self.projections())
        return (b[:, None] * B) @ (d[:, None] * A)

    def update(self, x: Tensor) -> Tensor:
        A, B = self.projections()
        return vera_linear(x, A, B, self.part("vera_lambda_d"), self.part("vera_lambda_b"))


class Vera(LayerMethod[VeraConfig]):
    """Scales of the rows and ranks of one random update that all layers share."""

    name = "vera"
    config = VeraConfig
    learning_rate = 2e-2
    learning_rate_source = Bilingual(
        "PEFT's example for VeRA: 2e-2; measured: 78% on SST-2 after 100 steps with 3.6e-2, 56% with 4e-3",
        "PEFT 的 VeRA 示例：2e-2；实测：SST-2 训练 100 步，用 3.6e-2 得 78%，用 4e-3 得 56%",
    )
    trains = Bilingual("two vectors a layer, which scale one random update", "每层两个向量，缩放共用的随机更新")
    default_targets = VERA_TARGETS

    def make(self, config: VeraConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> VeraLayer:
        return VeraLayer(config, layer, name, shared)

    def shared(self, config: VeraConfig, layers: Mapping[str, nn.Module]) -> Mapping[str, SharedSpec]:
        sizes = [features(layer) for layer in layers.values()]
        A, B = (config.r, max(i for i, _ in sizes)), (max(o for _, o in sizes), config.r)
        make = partial(_projections, config.projection_prng_key, A, B)
        return projection_specs(config, layers, {"vera_A": A, "vera_B": B}, make)


def projection_specs(
    config: ProjectionConfig,
    layers: Mapping[str, nn.Module],
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[], Sequence[Tensor]],
) -> dict[str, SharedSpec]:
    """Random projections that are not trained, by name. PEFT rounds them to the dtype of the base model, and so do we:
    with `save_projection: false` an adapter was trained with these.

    Args:
        make: Draws all of them, from the seed.
    """
    weights = (layer.get_parameter("weight") for layer in layers.values())
    dtypes = (weight.dtype for weight in weights if weight.is_floating_point())
    dtype = next(dtypes, torch.float32)

    def made(number: int, device: torch.device) -> Tensor:
        return make()[number].to(dtype).to(device, torch.float32)

    return {
        name: SharedSpec(shape, partial(made, number), trained=False, saved=config.save_projection)
        for number, (name, shape) in enumerate(shapes.items())
    }


def _projections(seed: int, *shapes: tuple[int, int]) -> list[Tensor]:
    """One after another from one seed, on the CPU: uniform, with variance 2 / columns, as PEFT draws them."""
    generator = torch.Generator().manual_seed(seed)
    bounds = (math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns)) for _, columns in shapes)
    return [
        torch.empty(shape).uniform_(-bound, bound, generator=generator)
        for shape, bound in zip(shapes, bounds, strict=True)
    ]
