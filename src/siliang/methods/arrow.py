"""Arrow (Ostapenko et al., 2024, arXiv:2405.11157), a variant of LoRA that mixes trained LoRA adapters for each token.

    y = W x + sum_e c_e s_e B_e A_e x        c = softmax(|v_e . x| / T) of the K largest, 0 of the others

The experts (A_e, B_e, s_e) are the plain LoRA adapters that are on the layer, loaded before or after; v_e, the
prototype of an expert, is the first right singular vector of B_e A_e. Nothing is trained.

GenKnowSub (2025, aclanthology.org/2025.acl-short.54): the means of the A and of the B of general adapters, which are
not among the experts, are subtracted from A_e and B_e.

Shapes: x (..., I), v (E, I), c (..., E), A_e (R, I), B_e (O, R); E experts, I in, O out, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from siliang.language import Bilingual
from siliang.methods.fields import check_fields
from siliang.methods.layer import BaseForward, Layer
from siliang.methods.lora_linear import LoraLinear
from siliang.methods.low_rank import LoraSpec, LowRank
from siliang.types import ConfigError, MergeError

ROUTER, EXPERT, GENERAL = "arrow_router", "task_", "gks_"  # what PEFT calls the adapters
ROUNDS = 15  # of the power iteration, as in PEFT
WHY_NOT_MERGED = Bilingual(
    "Cannot merge an active Arrow router adapter: it mixes the adapters anew for each token. Merge one of them.",
    "Arrow 路由无法合并：它为每个词元重新组合各适配器。请合并其中一个适配器。",
)
WHY_NOT_TRAINED = Bilingual(
    "Arrow mixes trained adapters, and has nothing to train: call create_arrow_model",
    "Arrow 组合已训练的适配器，自身没有可训练的参数：请调用 create_arrow_model",
)


@dataclass
class ArrowConfig:
    """Arrow's settings, with PEFT's names and defaults.

    Attributes:
        top_k: K: how many adapters compute at each token.
        router_temperature: T.
        use_gks: GenKnowSub.
        task_adapter_names: The experts at the beginning. create_arrow_model sets it.
        gks_adapter_names: The general adapters of GenKnowSub. create_arrow_model sets it.
        rng_seed: Of the vectors from which the prototypes' power iteration starts. None: PyTorch's random numbers.
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = None
    gks_adapter_names: list[str] | None = None
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("top_k", "router_temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    Bilingual(
                        f"{name} = {getattr(self, name)}: must be more than 0.",
                        f"{name} = {getattr(self, name)}：须大于 0。",
                    )
                )


@dataclass(frozen=True)
class Routed:
    """What the router has made of the layer's adapters as they are now.

    Attributes:
        source: The adapters, and what their factors were.
        prototypes: v, in the dtype of A.
    """

    source: tuple[object, ...]
    prototypes: Tensor


class ArrowLinear(LoraLinear):
    """The router of the adapters on a layer. Its own A and B, which PEFT's files have, compute nothing."""

    def __init__(self, layer: Layer, name: str, spec: LoraSpec, settings: ArrowConfig) -> None:
        super().__init__(layer, name, spec)
        self._settings = settings
        self._routed: Routed | None = None
        self.A.requires_grad_(False)
        self.B.requires_grad_(False)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {}

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        """y = W x + sum_e c_e s_e B_e A_e x"""
        y = base_forward(x)
        experts = self._experts()
        A, B = self._factors(experts)
        x = x.to(A[0].dtype)  # of a token whose scores are close, half precision would choose another adapter
        ranks = torch.tensor([len(a) for a in A], device=x.device)
        weights = self._coefficients(x, self._prototypes(experts, A, B)) * torch.tensor([e.s for e in experts]).to(x)
        z = F.linear(x, torch.cat(A)) * weights.repeat_interleave(ranks, -1)
        delta = F.linear(z, torch.cat(B, 1))
        return y + F.dropout(delta, self.dropout_p, self.layer.training).to(y.dtype)

    def _coefficients(self, x: Tensor, v: Tensor) -> Tensor:
        """c, (..., E)."""
        scores = F.linear(x, v).abs()
        top = scores.topk(min(self._settings.top_k, len(v)), -1)
        chosen = (top.values / self._settings.router_temperature).softmax(-1)
        return torch.zeros_like(scores).scatter(-1, top.indices, chosen)

    def _experts(self) -> list[LoraLinear]:
        """The trained adapters on the layer.

        Raises:
            ConfigError: There is none, or one is more than s B A.
        """
        general = re.compile(rf"{GENERAL}\d+")
        named = [a for name, a in self.layer.adapters.items() if not general.fullmatch(name)]
        found = [_plain(a) for a in named if isinstance(a, LowRank) and not isinstance(a, ArrowLinear)]
        if not found:
            raise ConfigError(
                Bilingual(
                    "Arrow's router has no trained adapters on its layers: load them, or call create_arrow_model.",
                    "Arrow 路由所在的层上没有已训练的适配器：请先加载它们，或调用 create_arrow_model。",
                )
            )
        return found

    def _factors(self, experts: Sequence[LoraLinear]) -> tuple[list[Tensor], list[Tensor]]:
        """A and B of each expert, less the general adapters' mean."""
        A, B = [e.A for e in experts], [e.B for e in experts]
        if not self._settings.use_gks:
            return A, B
        general = [_plain(self.layer.adapters[name]) for name in self._settings.gks_adapter_names or ()]
        mean_A, mean_B = (torch.stack(parts).mean(0) for parts in ([g.A for g in general], [g.B for g in general]))
        return [a - mean_A for a in A], [b - mean_B for b in B]

    @torch.no_grad()
    def _prototypes(self, experts: Sequence[LoraLinear], A: Sequence[Tensor], B: Sequence[Tensor]) -> Tensor:
        """v of each expert, (E, I), computed where the adapters are others than before, or have changed."""
        general = [self.layer.adapters[name] for name in self._settings.gks_adapter_names or ()]
        source = tuple(_state(a) for a in (*experts, *general))
        if self._routed is None or self._routed.source != source:
            vectors = [self._prototype(a.float(), b.float()).to(a.dtype) for a, b in zip(A, B, strict=True)]
            self._routed = Routed(source, torch.stack(vectors))
        return self._routed.prototypes

    def _prototype(self, A: Tensor, B: Tensor) -> Tensor:
        """The first right singular vector of B A, by power iteration on (B A)^T B A."""
        seed, generator = self._settings.rng_seed, None
        if seed is not None:
            generator = torch.Generator(A.device).manual_seed(seed)
        BB = B.T @ B
        v = torch.randn(A.shape[1], device=A.device, generator=generator)
        v = v / (v.norm() + 1e-8)
        for _ in range(ROUNDS):
            v = A.T @ (BB @ (A @ v))
            v = v / (v.norm() + 1e-8)
        return v

    def delta(self) -> Tensor:
        raise MergeError(WHY_NOT_MERGED)

    def merged(self) -> dict[str, Tensor]:
        raise MergeError(WHY_NOT_MERGED)

    def check_merge(self) -> None:
        raise MergeError(WHY_NOT_MERGED)


def _plain(adapter: object) -> LoraLinear:
    """
    Raises:
        ConfigError: The adapter is more than s B A.
    """
    if type(adapter) is not LoraLinear or adapter.b is not None or adapter.residual is not None:
        name = getattr(adapter, "name", "?")
        raise ConfigError(
            Bilingual(
                f"Arrow mixes plain LoRA on linear layers, and adapter {name!r} is more than that: "
                f"delete_adapter({name!r}) first.",
                f"Arrow 只组合线性层上的普通 LoRA，而适配器 {name!r} 不是：请先调用 delete_adapter({name!r})。",
            )
        )
    return adapter


def _state(adapter: object) -> tuple[object, ...]:
    """What differs once an adapter has other factors, or they are elsewhere."""
    assert isinstance(adapter, LoraLinear)
    versions = [0 if t.is_inference() else t._version for t in (adapter.A, adapter.B)]
    return adapter, adapter.A.data_ptr(), adapter.B.data_ptr(), *versions, adapter.A.device, adapter.A.dtype


def check_arrow(settings: ArrowConfig) -> None:
    """
    Raises:
        ConfigError: There is nothing to mix.
    """
    if not settings.task_adapter_names:
        raise ConfigError(
            Bilingual(
                f"arrow_config cannot be set: {WHY_NOT_TRAINED}.", f"不能设置 arrow_config：{WHY_NOT_TRAINED.zh}。"
            )
        )
