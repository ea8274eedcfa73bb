"""LoRA on parameters that are no linear layer's: the experts of a mixture, in one tensor (PEFT's `target_parameters`).

    W_e' = W_e + s B_e A_e        for each expert e

The module is called with W' in the place of W: what it computes with W is its own, and is not known here. So the sum
is formed in each forward, in the dtype of W, and there is no dropout, for no input of A is seen. A parameter of two
dimensions is one expert.

Shapes: W (E, O, I), or (E, I, O) where the module says `is_transposed`, or (O, I); A (E R, I), the rows expert by
expert; B (O, R E), the columns rank by rank; E experts, I in, O out, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.computed import call_with, parameter_of
from siliang.methods.layer import BaseForward, Layer, LayerAdapter, MakeAdapter, trained_dtype
from siliang.methods.low_rank import LoraSpec, draw_factors
from siliang.models.introspect import is_multihead_attention
from siliang.module_paths import ends_with, inside, parameter_paths
from siliang.types import TargetError, nearest

# PEFT has a wrapper for each parameter, one around the other, and its files the keys of that: the last is outermost.
INNER = "base_layer_"


class LoraParameters(LayerAdapter):
    """LoRA on some parameters of one module: `lora_A.<adapter>.weight` and `lora_B.<adapter>.weight` of the last of
    them, `base_layer_lora_A` and so on of the one before.
    """

    EXCLUSIVE = True
    WITH_ITS_KIND: ClassVar[bool] = True

    def __init__(self, layer: Layer, name: str, specs: Mapping[str, LoraSpec]) -> None:
        base: nn.Module = layer.base_layer
        parts: dict[str, nn.Module] = {}
        self._starts: dict[str, str] = {}  # by parameter: of the names of its A and B
        for depth, (key, spec) in enumerate(reversed(list(specs.items()))):
            W = base.get_parameter(key)
            E, O, I = sizes(base, W)  # noqa: E741, the equation's letters
            A = nn.Linear(I, E * spec.r, bias=False, device="meta")
            B = nn.Linear(E * spec.r, O, bias=False, device="meta")
            draw_factors(A, B, spec, device=W.device, dtype=trained_dtype(W))
            self._starts[key] = INNER * depth
            parts |= {f"{INNER * depth}lora_A": A, f"{INNER * depth}lora_B": B}
        super().__init__(layer, name, parts)
        outermost = specs[next(iter(self._starts))]
        self.set_scaling(outermost.scaling)
        self.settings = {**outermost.settings, "parameter_name": next(iter(self._starts))}
        self._scalings = {key: spec.scaling / outermost.scaling for key, spec in specs.items()}

    @property
    def parameter_names(self) -> list[str]:
        """The parameters of the module that it tunes, in the order of target_parameters."""
        return list(reversed(self._starts))

    def forward(self, x: Tensor, base_forward: BaseForward) -> Tensor:
        """The module with the updates of this and of the other active adapters."""
        here = [*(one for one in base_forward.inner if isinstance(one, LoraParameters)), self]
        base: nn.Module = self.layer.base_layer
        return base_forward.through(partial(_call, base, here), x)

    def tuned(self, key: str, W: Tensor) -> Tensor:
        """W + s B A in the dtype of W, of the parameter called `key`."""
        if key not in self._starts:
            return W
        base: nn.Module = self.layer.base_layer
        E, _, _ = sizes(base, W)
        start = self._starts[key]
        A = self.module(f"{start}lora_A", nn.Linear).weight.unflatten(0, (E, -1))  # (E, R, I)
        B = self.module(f"{start}lora_B", nn.Linear).weight.unflatten(1, (-1, E)).permute(2, 0, 1)  # (E, O, R)
        B = (self.s * self._scalings[key] * B).to(W.dtype)
        A = A.to(W.dtype)
        with torch.autocast(W.device.type, enabled=False):  # which would round what is fp32
            if W.dim() == 2:
                return torch.addmm(W, B[0], A[0])
            return torch.baddbmm(W, A.mT, B.mT) if is_transposed(base) else torch.baddbmm(W, B, A)

    def merged(self) -> dict[str, Tensor]:
        """W + s B A of each parameter; in fp32 where W is half, for it is rounded once, at the end."""
        base: nn.Module = self.layer.base_layer
        own = {key: base.get_parameter(key) for key in self._starts}
        return {key: self.tuned(key, W.to(torch.promote_types(W.dtype, torch.float32))) for key, W in own.items()}

    def delta_weight(self) -> Tensor:
        """Of the last parameter, as PEFT's outermost wrapper has it."""
        key = next(iter(self._starts))
        base: nn.Module = self.layer.base_layer
        W = base.get_parameter(key)
        return self.tuned(key, torch.zeros_like(W, dtype=torch.promote_types(W.dtype, torch.float32)))


def _call(base: nn.Module, adapters: Sequence[LoraParameters], *args: object, **kwargs: object) -> Tensor:
    """Calls a module with the parameters that adapters, one after another, make of its own."""
    found: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for adapter in adapters for key in adapter.parameter_names):
        found[key] = parameter_of(base, key)
        for adapter in adapters:
            found[key] = adapter.tuned(key, found[key])
    return call_with(base, found, *args, **kwargs)


def is_transposed(module: nn.Module) -> bool:
    """Whether the module of experts keeps its weights as (E, I, O)."""
    return bool(getattr(module, "is_transposed", False))


def sizes(module: nn.Module, W: Tensor) -> tuple[int, int, int]:
    """E, O and I of a parameter of `module`."""
    if W.dim() == 2:
        return 1, W.shape[0], W.shape[1]
    E, first, second = W.shape
    return (E, second, first) if is_transposed(module) else (E, first, second)


# ---- which parameters ----


def find_parameters(
    model: nn.Module, wanted: Sequence[str], *, outside: Sequence[str], lenient: bool
) -> dict[str, list[str]]:
    """The parameters that `target_parameters` names, by the path of the module that holds them.

    Args:
        wanted: Endings of their paths.
        outside: Modules that are saved whole, in which nothing is tuned.
        lenient: Some of several names may match nothing, as in files that PEFT wrote.

    Raises:
        TargetError: A name matches nothing, or what LoRA cannot tune.
    """
    there = dict(parameter_paths(model))
    missing = [name for name in wanted if not any(ends_with(path, name) for path in there)]
    if missing and not (lenient and len(missing) < len(wanted)):
        usual = {path.rpartition(".")[2] for path, p in there.items() if p.dim() == 3}
        hint = nearest(missing[0].rpartition(".")[2], usual)
        raise TargetError(
            Bilingual(
                f"target_parameters: {', '.join(map(repr, missing))} matches no parameter of "
                f"{type(model).__name__}.{hint} Its parameters of three dimensions: "
                f"{', '.join(sorted(usual)) or 'none'}.",
                f"target_parameters：{'、'.join(map(repr, missing))} 与 {type(model).__name__} 的任何参数都不"
                f"匹配。{hint.zh}它的三维参数：{'、'.join(sorted(usual)) or '无'}。",
            )
        )
    found: dict[str, list[str]] = {}
    for path, p in there.items():
        module, _, own = path.rpartition(".")
        if any(ends_with(path, name) for name in wanted) and not inside(module, outside):
            holder = model.get_submodule(module.rpartition(".")[0])
            _check(path, p, called=not is_multihead_attention(holder))
            found.setdefault(module, []).append(own)
    if wanted and not found:
        raise TargetError(
            Bilingual(
                f"modules_to_save ({', '.join(outside[:3])}) holds all that target_parameters matches.",
                f"target_parameters 匹配到的参数都在 modules_to_save（{'、'.join(outside[:3])}）之内。",
            )
        )
    return found


def _check(path: str, p: nn.Parameter, *, called: bool) -> None:
    """
    Args:
        called: The module that holds it is called, and not read by the one around it.

    Raises:
        TargetError: LoRA cannot tune this parameter.
    """
    why = None
    if not p.is_floating_point():
        why = Bilingual("it is quantized", "它已量化")
    elif p.dim() not in (2, 3):
        why = Bilingual(
            f"it has {p.dim()} dimensions, and LoRA needs 2 or 3", f"它有 {p.dim()} 维，LoRA 需要 2 或 3 维"
        )
    elif "." not in path:
        why = Bilingual("the whole model holds it, not one of its modules", "它属于整个模型，而不是其中的某个模块")
    elif not called:
        why = Bilingual("the attention around it reads it, without a call", "外层的注意力只读取它，不调用它所在的模块")
    if why is not None:
        raise TargetError(
            Bilingual(
                f"target_parameters: {path} cannot be tuned: {why}. Leave it out.",
                f"target_parameters：{path} 无法微调：{why.zh}。请去掉它。",
            )
        )


def on_parameters(
    found: Mapping[str, Sequence[str]], specs: Mapping[str, LoraSpec], layers: Sequence[str]
) -> dict[str, MakeAdapter]:
    """What LoRA is on the modules that hold the parameters, by path.

    Args:
        found: As `find_parameters` gives them.
        specs: LoRA on each parameter, by its path.
        layers: The layers that target_modules names.

    Raises:
        TargetError: One of these holds a parameter.
    """
    if twice := next((module for module in found if module in layers), None):
        raise TargetError(
            Bilingual(
                f"target_parameters: {twice}.{found[twice][0]} is a part of {twice}, which target_modules names too. "
                "Leave it out of one of them.",
                f"target_parameters：{twice}.{found[twice][0]} 属于 {twice}，而 target_modules 也包含它。"
                "请从其中一个中去掉。",
            )
        )
    return {module: partial(_make, {own: specs[f"{module}.{own}"] for own in names}) for module, names in found.items()}


def _make(specs: Mapping[str, LoraSpec], layer: Layer, name: str, shared: Mapping[str, Tensor]) -> LoraParameters:
    return LoraParameters(layer, name, specs)


# ---- the keys of PEFT's files ----


def to_nested_keys(key: str) -> str:
    """The key of a tensor as PEFT's files have it."""
    return re.sub(rf"\.((?:{INNER})+)(lora_[AB]\.)", lambda m: f".{m[1].replace('_layer_', '_layer.')}{m[2]}", key)


def from_nested_keys(key: str) -> str:
    """The way back."""
    return re.sub(r"\.((?:base_layer\.)+)(lora_[AB]\.)", lambda m: f".{m[1].replace('.', '_')}{m[2]}", key)
