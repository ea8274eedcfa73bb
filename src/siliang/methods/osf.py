"""OSF: Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning (Nayak et al., 2025,
arXiv:2504.07097).

    W = U_k S_k V_k + U_0 S_0 V_0        the K largest singular values, and the R others
    y = (W + U S V - U_0 S_0 V_0) x      U, S and V start at U_0, S_0 and V_0: at the start y = W x exactly

U_k, S_k and V_k are what the base model knows best. They are frozen, and projected out of the gradients:

    dU := (1 - U_k U_k^T) dU        dV := dV (1 - V_k^T V_k)

Where U is square 1 - U_k U_k^T = U_0 U_0^T, and V likewise. The file holds U, S and V; all else follows from the base.

Shapes: W (O, I), U_k (O, K), S_k (K,), V_k (K, I), U (O, R), S (R,), V (R, I); I in, O out, K + R = min(O, I),
K = effective_rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.additive import Additive
from siliang.methods.config import LayerConfig
from siliang.methods.layer import Layer, trained_dtype
from siliang.methods.layer_method import LayerMethod
from siliang.methods.method import Parts
from siliang.methods.targets import OSF_TARGETS
from siliang.models.introspect import features
from siliang.models.quantized import float_weight, is_quantized
from siliang.ops.projected_gradient import inside_of, outside_of
from siliang.types import ConfigError, PeftType


@dataclass(kw_only=True)
class OSFConfig(LayerConfig):
    """OSF's settings, with PEFT's names and defaults.

    Attributes:
        effective_rank: Singular values of a layer that stay as they are, the largest: their number, or a fraction of
            all, as 0.5. None: half of them. Unlike a rank of LoRA it is what is not trained.
        rank_pattern: That of single layers, by expressions that are searched for in the layers' names.
        init_weights: Training starts from the base model. False: from random numbers, for tests.
        target_svd_config: Of no effect, as in PEFT.
    """

    effective_rank: int | float | None = None
    rank_pattern: dict[str, int | float] | None = None
    init_weights: bool | None = True
    target_svd_config: dict[str, int] | None = None

    peft_type: ClassVar[str] = PeftType.OSF
    NOT_IN_PEFT: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    def __post_init__(self) -> None:
        super().__post_init__()
        named = {f"rank_pattern: {key!r}": value for key, value in (self.rank_pattern or {}).items()}
        for name, value in {"effective_rank": self.effective_rank, **named}.items():
            if value is not None and not (1 <= value == int(value) or 0 < value < 1):
                raise ConfigError(
                    Bilingual(
                        f"{name} = {value}: must be a number of singular values, 1 or more, or a fraction of them, as "
                        "0.5.",
                        f"{name} = {value}：须为奇异值的个数（至少 1），或其比例，如 0.5。",
                    )
                )

    def kept(self, most: int) -> int:
        """K, of a layer with `most` singular values. 1.0 means all, and 1 means one."""
        if self.effective_rank is None:
            return most // 2
        is_fraction = isinstance(self.effective_rank, float) and self.effective_rank <= 1
        return min(int(most * self.effective_rank if is_fraction else self.effective_rank), most)


NOT_QUANTIZED = Bilingual(
    "OSF splits the base model's own weights, and rounded to a few bits they have other directions: load the base "
    "model without quantization, or choose another method.",
    "OSF 分解基座模型本身的权重，而取整到几位之后其方向会改变：请不量化地加载基座模型，或换一种方法。",
)


class OSFLayer(Additive):
    """OSF on a linear layer: S_low (R,), U_low (O, R) and V_low (R, I) of `osf_svd_params.<adapter>`."""

    def __init__(self, config: OSFConfig, layer: Layer, name: str) -> None:
        base = layer.base_layer
        if is_quantized(base):
            raise ConfigError(NOT_QUANTIZED)
        K = config.kept(min(features(base)))
        if K < 1:
            raise ConfigError(
                Bilingual(
                    f"effective_rank = {config.effective_rank}: a layer has {min(features(base))} singular values, and "
                    "none of them would stay. Choose more.",
                    f"effective_rank = {config.effective_rank}：有一层只有 {min(features(base))} 个奇异值，"
                    "一个也不会保留。请调大。",
                )
            )
        W_OI = float_weight(base).detach()
        U, S, V = torch.linalg.svd(W_OI.to(trained_dtype(W_OI)), full_matrices=False)
        low = {"S_low": S[K:].clone(), "U_low": U[:, K:].contiguous(), "V_low": V[K:].contiguous()}
        start = low if config.init_weights is not False else {key: torch.randn_like(t) for key, t in low.items()}
        params = nn.ParameterDict({key: nn.Parameter(t.clone()) for key, t in start.items()})
        super().__init__(layer, name, {"osf_svd_params": params})
        self.settings = {"effective_rank": K}
        for key, t in low.items():
            self.add_buffer(f"_osf_{key}_init", t)
        self.tall, self.wide = len(W_OI) > W_OI.shape[1], len(W_OI) < W_OI.shape[1]
        if self.tall:
            self.add_buffer("_osf_U_high", U[:, :K].contiguous())
        if self.wide:
            self.add_buffer("_osf_V_high", V[:K].contiguous())

    def delta(self) -> Tensor:
        """U S V - U_0 S_0 V_0."""
        S, U, V = self.module("osf_svd_params", nn.ParameterDict).values()
        S_0, U_0, V_0 = (self.part(f"_osf_{key}_low_init") for key in "SUV")
        U = outside_of(self.part("_osf_U_high"), U) if self.tall else inside_of(U_0, U)
        V = outside_of(self.part("_osf_V_high").T, V.T).T if self.wide else inside_of(V_0.T, V.T).T
        return (U * S) @ V - (U_0 * S_0) @ V_0


class OSF(LayerMethod[OSFConfig]):
    """The weights themselves, but for the directions that matter most."""

    name = "osf"
    config = OSFConfig
    learning_rate = 5e-5
    learning_rate_source = Bilingual("PEFT's comparison on MetaMathQA: 5e-5", "PEFT 在 MetaMathQA 上的对比：5e-5")
    trains = Bilingual(
        "the smaller half of each weight's singular values and vectors", "每个权重较小的一半奇异值及其向量"
    )
    default_targets = OSF_TARGETS
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "effective_rank"}
    patterns_around: ClassVar[tuple[str, str]] = (".*(?:", ")")  # searched for anywhere, as in PEFT

    def why_not_quantized(self, config: OSFConfig) -> str | None:
        return NOT_QUANTIZED

    def attach(self, model: nn.Module, config: OSFConfig, *, saved: Sequence[str], from_file: bool) -> Parts:
        if config.target_modules is None and not OSF_TARGETS.find(model).paths:
            config.target_modules = "all-linear"  # as in PEFT
        found = super().attach(model, config, saved=saved, from_file=from_file)
        sizes = [min(features(model.get_submodule(path))) for path in found.layers]
        if not config.rank_pattern and all(config.kept(most) == most for most in sizes):
            raise ConfigError(
                Bilingual(
                    f"effective_rank = {config.effective_rank}: every singular value of every layer would stay, and "
                    "nothing is left to train. Choose less.",
                    f"effective_rank = {config.effective_rank}：所有层的全部奇异值都会保留，没有可训练的部分。请调小。",
                )
            )
        return found

    def make(self, config: OSFConfig, layer: Layer, name: str, shared: Mapping[str, Tensor]) -> OSFLayer:
        return OSFLayer(config, layer, name)
