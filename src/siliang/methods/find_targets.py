"""Which layers of a base model a config names, and errors with similar names where it names none."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any

from torch import nn

from siliang.language import Bilingual, both, local
from siliang.methods.blocks import ALL_BLOCKS, Blocks
from siliang.methods.config import LayerConfig
from siliang.methods.targets import DefaultTargets
from siliang.models.introspect import fused_layers, is_convolution, is_linear, is_multihead_attention, output_layer
from siliang.module_paths import ends_with, inside, matching_paths, plain_modules
from siliang.types import TargetError, nearest


def find_targets(
    model: nn.Module,
    config: LayerConfig,
    supports: Callable[[nn.Module], bool],
    *,
    defaults: DefaultTargets,
    outside: Sequence[str],
    lenient: bool,
    blocks: Blocks = ALL_BLOCKS,
    also_named: Mapping[str, Sequence[str] | str | None] | None = None,
) -> list[str]:
    """The paths of the layers that `config` names; fills in its `target_modules` where it is None or "all-linear".

    Args:
        supports: Whether the method can work on a layer.
        defaults: The usual targets.
        outside: Modules that are saved whole, in which nothing is tuned.
        lenient: Some of several names may match nothing, as in files that PEFT wrote.
        blocks: The layers of the model that count.
        also_named: Other settings that name modules, which must be there.

    Raises:
        TargetError: A name or the regex matches nothing, or a match is not a layer that the method can wrap.
    """
    modules = dict(plain_modules(model))
    supported = [p for p, m in modules.items() if supports(m) and not inside(p, outside)]
    wanted = config.target_modules
    if not lenient:
        _check_named({"exclude_modules": config.exclude_modules, **(also_named or {})}, list(modules))
        blocks.check(list(modules))
    if wanted is None:
        wanted = config.target_modules = _default_targets(model, config, supported, defaults, modules, outside)
    if not wanted:
        raise TargetError(
            Bilingual(
                "target_modules is empty: name layers, or leave it out for the usual ones of the model.",
                "target_modules 为空：请写出层名，或去掉它以使用该模型的常用设置。",
            )
        )
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        found = _all_linear(model, modules, supported)
        _warn_of_experts(config, modules)
        # as in PEFT the file has the names, so that it means the same on a model with other linear layers
        config.target_modules = names_of(found, modules, outside)
    elif isinstance(wanted, str):
        found = _by_expression(wanted, modules, supported)
    else:
        found = _by_endings(wanted, model, modules, supported, lenient=lenient)
    found = _left(found, config, blocks, outside)
    if not lenient:
        _check_called(found, _uncalled(modules), modules)
    _check_supported(found, supports, modules, config, by_expression=isinstance(wanted, str))
    return found


def samples(paths: Sequence[str]) -> str:
    """Some of the paths, for an error."""
    return ", ".join(map(repr, paths[:3])) or "(none)"


def names_of(found: list[str], modules: Iterable[str], outside: Sequence[str]) -> list[str] | str:
    """Names that match the layers of `found` alone: their last part where no other has it, otherwise the whole path."""
    chosen = set(found)
    others = [p for p in modules if p not in chosen and not inside(p, outside)]

    def own(name: str) -> bool:
        return not name.isdigit() and not any(ends_with(p, name) for p in others)

    names = sorted({last if own(last := path.rpartition(".")[2]) else path for path in found})
    if any(ends_with(other, name) for other in others for name in names):  # "0" at the root is in every list
        return "|".join(re.escape(path) for path in found)
    return names


# ---- what the config names ----


def _default_targets(
    model: nn.Module,
    config: LayerConfig,
    supported: Sequence[str],
    defaults: DefaultTargets,
    modules: Mapping[str, nn.Module],
    outside: Sequence[str],
) -> list[str] | str:
    """The names of the usual layers, or an error that lists the layers where none is usual."""
    found = defaults.find(model)
    if found.paths:
        chosen = set(found.paths)
        elsewhere = any(ends_with(p, name) for p in modules if p not in chosen for name in found.names)
        return names_of(found.paths, modules, outside) if elsewhere else found.names
    endings = sorted({p.rpartition(".")[2] for p in supported})
    way = (
        Bilingual("set target_modules: all-linear, or name some", "请设置 target_modules: all-linear，或写出层名")
        if any(is_linear(modules[p]) for p in supported)
        else Bilingual("name them in target_modules", "请在 target_modules 中写出层名")
    )
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    raise TargetError(
        Bilingual(
            f"No default target_modules of {config.peft_type} are known for model type {model_type!r}: {way}. "
            f"Layers that can be tuned: {', '.join(endings) or 'none'}.",
            f"{config.peft_type} 没有模型类型 {model_type!r} 的默认 target_modules：{way.zh}。"
            f"可以微调的层：{'、'.join(endings) or '无'}。",
        )
    )


def _all_linear(model: nn.Module, modules: Mapping[str, nn.Module], supported: Sequence[str]) -> list[str]:
    """Every linear layer but the one that makes the logits."""
    left_out = _uncalled(modules)
    head = output_layer(model)
    return [p for p in supported if modules[p] is not head and is_linear(modules[p]) and p not in left_out]


def _warn_of_experts(config: LayerConfig, modules: Mapping[str, nn.Module]) -> None:
    """Says which weights of experts all-linear leaves out."""
    named: Sequence[str] = getattr(config, "target_parameters", None) or ()
    left_out = [e for e in _experts(modules) if not any(ends_with(e, n) or ends_with(n, e) for n in named)]
    if not left_out:
        return
    way = Bilingual(f"{config.peft_type} cannot tune them", f"{config.peft_type} 无法微调它们")
    if hasattr(config, "target_parameters"):
        way = Bilingual("name them in target_parameters to tune them", "如需微调，请写入 target_parameters")
    warnings.warn(
        both(
            f"target_modules='all-linear' leaves out {', '.join(left_out)}, which are no linear layers: {way}.",
            f"target_modules='all-linear' 不包括 {'、'.join(left_out)}，它们不是线性层：{way.zh}。",
        ),
        stacklevel=2,  # one place, so that it is shown once
    )


def _experts(modules: Mapping[str, nn.Module]) -> list[str]:
    """The weights of experts that are one tensor, and of their routers, by the ends of their names."""
    own = {p: m for p, m in modules.items() if not type(m).__module__.startswith("torch.")}
    sizes = {
        f"{path.rpartition('.')[2]}.{name}": (p.dim(), type(module).__name__)
        for path, module in own.items()
        for name, p in module.named_parameters(recurse=False)
        if p.dim() in (2, 3) and p.shape[0] > 1  # a table of positions is (1, N, D)
    }
    if not any(dim == 3 for dim, _ in sizes.values()):
        return []
    return sorted(name for name, (dim, kind) in sizes.items() if dim == 3 or "Router" in kind)


def _by_expression(wanted: str, modules: Mapping[str, nn.Module], supported: Sequence[str]) -> list[str]:
    """The modules whose whole paths match a regular expression."""
    found = matching_paths("target_modules", list(modules), wanted)
    if not found:
        raise TargetError(
            Bilingual(
                f"target_modules = {wanted!r} matches no module. The names are like {samples(supported)}.",
                f"target_modules = {wanted!r} 没有匹配到任何模块。可用的名称形如 {samples(supported)}。",
            )
        )
    return found


def _by_endings(
    wanted: Sequence[str],
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    supported: Sequence[str],
    *,
    lenient: bool,
) -> list[str]:
    """The modules whose paths end with one of the names."""
    missing = [name for name in wanted if not any(ends_with(p, name) for p in modules)]
    if missing and not (lenient and len(missing) < len(wanted)):
        endings = {p.rpartition(".")[2] for p in supported}
        hint = nearest(missing[0], endings)
        experts = Bilingual("", "")
        if weights := _experts(modules):
            experts = Bilingual(
                f" The weights of experts are parameters (target_parameters of LoRA): {', '.join(weights)}.",
                f"专家的权重是参数（LoRA 的 target_parameters）：{'、'.join(weights)}。",
            )
        raise TargetError(
            Bilingual(
                f"target_modules: {', '.join(map(repr, missing))} matches no module of "
                f"{type(model).__name__}.{hint} "
                f"Layers that can be tuned: {', '.join(sorted(endings)) or 'none'}.{experts}",
                f"target_modules：{'、'.join(map(repr, missing))} 与 {type(model).__name__} 的任何模块都不"
                f"匹配。{hint.zh}可以微调的层：{'、'.join(sorted(endings)) or '无'}。{experts.zh}",
            )
        )
    return [p for p in modules if any(ends_with(p, name) for name in wanted)]


# ---- what is left of it, and whether the method can work there ----


def _left(found: Sequence[str], config: LayerConfig, blocks: Blocks, outside: Sequence[str]) -> list[str]:
    """Those of the named layers that are neither excluded, nor in other blocks, nor saved whole."""
    excluded = set(matching_paths("exclude_modules", found, config.exclude_modules))
    found = blocks.among([p for p in found if p not in excluded])
    saved = found or (outside if config.target_modules == [] else [])  # all-linear does not search in them
    found = [p for p in found if not inside(p, outside)]
    if saved and not found:
        raise TargetError(
            Bilingual(
                f"modules_to_save ({', '.join(outside[:3])}) holds all that target_modules matches.",
                f"target_modules 匹配到的层都在 modules_to_save（{'、'.join(outside[:3])}）之内。",
            )
        )
    if not found:
        raise TargetError(
            Bilingual(
                "target_modules match nothing once exclude_modules and layers_to_transform are applied.",
                "应用 exclude_modules 和 layers_to_transform 之后，target_modules 没有匹配到任何层。",
            )
        )
    return found


def _uncalled(modules: Mapping[str, nn.Module]) -> set[str]:
    """The layers of which an attention around them reads the weight: what is put on them has no effect."""
    attentions = [path for path, module in modules.items() if is_multihead_attention(module)]
    found = {f"{path}.out_proj" if path else "out_proj" for path in attentions}
    return found | {f"{path}.{name}" for path, module in modules.items() for name in fused_layers(module)}


def _check_called(found: Sequence[str], uncalled: set[str], modules: Mapping[str, nn.Module]) -> None:
    """
    Raises:
        TargetError: A target is never called.
    """
    if wrong := next((path for path in found if path in uncalled), None):
        attention, _, own = wrong.rpartition(".")
        if not is_multihead_attention(modules[attention]):
            kind = type(modules[attention]).__name__
            raise TargetError(
                Bilingual(
                    f"target_modules: {wrong!r} is not called where Mamba's kernels compute: {kind} passes them the "
                    f"weight. Leave {own} out.",
                    f"target_modules：使用 Mamba 内核时不会调用 {wrong!r}：它所在的 {kind} 把权重直接传给内核。"
                    f"请去掉 {own}。",
                )
            )
        raise TargetError(
            Bilingual(
                f"target_modules: {wrong!r} is not called, its nn.MultiheadAttention reads the weight alone. Target "
                f"{attention!r} (method lora does both), or leave it out by exclude_modules.",
                f"target_modules：{wrong!r} 不会被调用，它所在的 nn.MultiheadAttention 只读取权重。"
                f"请改为以 {attention!r} 为目标（lora 会同时处理两者），或用 exclude_modules 去掉它。",
            )
        )


def _check_supported(
    found: Sequence[str],
    supports: Callable[[nn.Module], bool],
    modules: Mapping[str, nn.Module],
    config: LayerConfig,
    *,
    by_expression: bool,
) -> None:
    """
    Raises:
        TargetError: A target is not a layer that the method can wrap.
    """
    unsupported = next((p for p in found if not supports(modules[p])), None)
    if unsupported is None:
        return
    module = modules[unsupported]
    kind, plain = type(module).__name__, Bilingual("", "")
    if _only_groups_prevent(module, supports):
        plain = Bilingual(f" in {module.groups} groups", f"，分为 {module.groups} 组")
    elif next(module.children(), None) is None and hasattr(module, "weight"):
        plain = Bilingual(" and no linear layer", "，不是线性层")
    what = repr(unsupported) if unsupported else Bilingual("the whole model", "整个模型")
    way = Bilingual("", "")
    if by_expression:
        way = Bilingual(
            " End the pattern with the layers' own names, as in .*(q_proj|v_proj), or use a list, or all-linear.",
            "请让表达式以层自己的名称结尾，如 .*(q_proj|v_proj)，或使用列表，或 all-linear。",
        )
    raise TargetError(
        Bilingual(
            f"target_modules: {what} is a {kind}{plain}, which {config.peft_type} cannot wrap.{way}",
            f"target_modules：{local(what, 'zh')} 是 {kind}{plain.zh}，{config.peft_type} 不能用于它。{way.zh}",
        )
    )


def _only_groups_prevent(module: nn.Module, supports: Callable[[nn.Module], bool]) -> bool:
    """Whether a method could work on a convolution if that had one group."""
    if not is_convolution(module) or module.groups == 1:
        return False
    whole: Any = copy(module)
    whole.groups = 1
    return supports(whole)


def _check_named(named: Mapping[str, Sequence[str] | str | None], paths: list[str]) -> None:
    """Checks that settings other than the targets name modules of the model: they would have no effect otherwise.

    Args:
        named: Endings, or a regular expression, by the setting that names them.

    Raises:
        TargetError: One matches nothing.
    """
    for field, value in named.items():
        for name in [value] if value and isinstance(value, str) else value or ():
            if not matching_paths(field, paths, name if isinstance(value, str) else [name]):
                hint = nearest(name, {p.rpartition(".")[2] for p in paths})
                raise TargetError(
                    Bilingual(
                        f"{field}: {name!r} matches no module of the model.{hint}",
                        f"{field}：{name!r} 与模型的任何模块都不匹配。{hint.zh}",
                    )
                )
