"""LILY: Low-Rank Interconnected Adaptation across Layers (Zhong et al., 2025, arXiv:2407.09946).

    y = x W^T + s h B        h = x A^T,  B = p_1 B_1 + ... + p_E B_E,  p = mean over the batch of softmax(h W_r^T)

Layers with the same name and shape share the B_e, all of them, and A in groups of `stride_A` that follow each other.
Each has its own W_r, a router, that says how it mixes the B_e. B_e = 0 at the start.

p is one for all tokens that the layer reads at once, as in PEFT: the output for a text depends on the rest of the
batch and on the padding, and in generation with a cache each new token is weighed without those before it.

Shapes: W (O, I), x (T, I) with any leading dimensions, A (R, I), h (T, R), W_r (E, R), p (E,), B_e (R, O), stored as
(E R, O); I in, O out, R = r, E = num_B.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.layer import BaseForward, Layer, LayerAdapter, Weight, kaiming, new_parameter
from siliang.methods.layer_method import BlocksConfig, LayerMethod
from siliang.methods.method import Parts
from siliang.models.introspect import features
from siliang.module_paths import ends_with
from siliang.types import ConfigError, MergeError, PeftType

WHY_NOT_MERGEABLE = Bilingual(
    "LILY mixes its matrices by what a layer reads: there is no one update that could be merged.",
    "LILY 按层的输入混合其矩阵：没有可以合并的固定更新。",
)


@dataclass(kw_only=True)
class LilyConfig(BlocksConfig):
    """LILY's settings, with PEFT's names and defaults.

    Attributes:
        r: Rank; two to four times LoRA's, say PEFT's authors, because fewer matrices are trained.
        stride_A: Layers of one name that follow each other and share an A.
        num_B: How many B_e the layers of one name have.
        scaling: s, not divided by the rank.
        init_weights: B starts at zero. False: random, for tests.
    """

    r: int = 32
    stride_A: int = 1  # noqa: N815, PEFT's name
    num_B: int = 2  # noqa: N815, PEFT's name
    scaling: float = 1.0
    init_weights: bool = True

    peft_type: ClassVar[str] = PeftType.LILY
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ("r", "stride_A")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.num_B <= self.MOST:
            raise ConfigError(
                Bilingual(
                    f"num_B = {self.num_B}: must be at least 2, for the router to choose from.",
                    f"num_B = {self.num_B}：至少为 2，路由器才有得选。",
                )
            )


class LilyLayer(LayerAdapter):
    """LILY on a linear layer: `lily_A.<adapter>.weight` (R, I), `lily_B` (E R, O) and `lily_router` (E, R)."""

    def __init__(self, config: LilyConfig, layer: Layer, name: str) -> None:
        in_features, out_features = features(layer.base_layer)
        R, E = config.r, config.num_B
        start = nn.init.zeros_ if config.init_weights else kaiming
        parts = {
            "lily_A": Weight(new_parameter(layer, R, in_features, start=kaiming)),
            "lily_B": Weight(new_parameter(layer, E * R, out_features, start=start)),
            "lily_router": Weight(new_parameter(layer, E, R, start=kaiming)),
        }
        super().__init__(layer, name, parts)
        self.settings = {"r": R, "stride_A": config.stride_A, "num_B": E}
        self.set_scaling(config.scaling)

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        y_TO = base_forward(x)
        A_RI, B_ERO, W_ER = (self.module(f"lily_{key}", Weight).weight.to(x.device) for key in ("A", "B", "router"))
        h_TR = F.linear(x, A_RI.to(x.dtype))
        logits_TE = F.linear(h_TR, W_ER.to(h_TR.dtype))
        p_E = logits_TE.softmax(-1, dtype=torch.float32).flatten(0, -2).mean(0)
        B_RO = torch.einsum("e,ero->ro", p_E.to(B_ERO.dtype), B_ERO.unflatten(0, W_ER.shape))
        return y_TO + self.s * (h_TR @ B_RO.to(h_TR.dtype)).to(y_TO.dtype)

    def merged(self) -> dict[str, Tensor]:
        raise MergeError(WHY_NOT_MERGEABLE)


class Lily(LayerMethod[LilyConfig]):
    """Low-rank updates whose matrices several layers share, and mix by what they read."""

    name = "lily"
    config = LilyConfig
    learning_rate = 1e-4
    learning_rate_source = Bilingual(
        "PEFT's comparison on MetaMathQA: 1e-4 with scaling = 2 to 8",
        "PEFT 在 MetaMathQA 上的对比：1e-4，scaling = 2 到 8",
    )
    trains = Bilingual(
        "thin matrices that layers share, and routers that mix them", "各层共享的低秩矩阵，以及混合它们的路由器"
    )
    why_not_mergeable = WHY_NOT_MERGEABLE

    def mixes_rows(self, config: LilyConfig) -> str | None:
        return self.name

    def attach(self, model: nn.Module, config: LilyConfig, *, saved: Sequence[str], from_file: bool) -> Parts:
        parts = super().attach(model, config, saved=saved, from_file=from_file)
        groups: dict[tuple[str, tuple[int, int]], list[str]] = defaultdict(list)
        for path in parts.layers:
            groups[_target(config, path), features(model.get_submodule(path))].append(path)
        shared: dict[str, dict[str, str]] = defaultdict(dict)
        for paths in groups.values():
            for number, path in enumerate(paths):
                if number % config.stride_A:
                    shared[path]["lily_A"] = paths[number - number % config.stride_A]
                if number:
                    shared[path]["lily_B"] = paths[0]
        return replace(parts, shared_parts=shared)

    def make(self, config: LilyConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> LilyLayer:
        return LilyLayer(config, layer, name)


def _target(config: LilyConfig, path: str) -> str:
    """The name in `target_modules` that a layer has, the longest one; an expression is one name for all."""
    targets = config.target_modules or ()
    return targets if isinstance(targets, str) else max((t for t in targets if ends_with(path, t)), key=len)
