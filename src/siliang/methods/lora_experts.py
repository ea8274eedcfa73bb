"""LoRA on the layers that experts had in transformers 4, where they are parameters now (`target_parameters`).

    [W1; W3] + s [B1 0; 0 B3] [A1; A3]    of an expert whose layers W1 and W3 are one matrix now

PEFT reads adapters of transformers 4 so. The ranks add up, and the scaling stays. In a new adapter the factors of the
one matrix are trained whole.

Shapes: A1 (R1, I), B1 (O1, R1) of a former layer; A (E R, I), B (O, R E) as in lora_parameters.py; O = O1 + O3 and
R = R1 + R3.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor, nn

from siliang.language import Bilingual, local
from siliang.methods.find_targets import names_of
from siliang.methods.layer_patterns import LayerPatterns
from siliang.methods.lora_config import LoraConfig
from siliang.models.former_layers import FormerLayer, former_layers
from siliang.models.introspect import is_linear
from siliang.module_paths import ends_with, matching_paths, parameter_paths, plain_modules
from siliang.types import AdapterError, ConfigError, TargetError, message_of

N = TypeVar("N", int, float)

START = "base_model.model."  # of a file's keys


# ---- a new adapter ----


def move_experts(model: nn.Module, config: LoraConfig) -> None:
    """Moves the layers of experts that `target_modules` names to `target_parameters`, in place.

    Raises:
        TargetError: It names some of the layers that are one tensor now, and not the others.
        ConfigError: A setting does not work on parameters, or differs between layers that are one tensor now.
    """
    wanted = config.target_modules
    if not wanted or (isinstance(wanted, str) and wanted.lower() == "all-linear"):
        return
    former = former_layers(model)
    paths = [layer.path for layer in former]
    named = set(matching_paths("target_modules", paths, wanted))
    named -= set(matching_paths("exclude_modules", paths, config.exclude_modules))
    chosen = _not_yet_parameters(config, [layer for layer in former if layer.path in named])
    if not chosen:
        return
    if (lacking := _lacking(chosen, former)) is not None:
        raise TargetError(
            Bilingual(
                f"target_modules: {lacking} Name both, or neither.",
                f"target_modules：{lacking.zh}请两者都写，或都不写。",
            )
        )
    holders = {layer.module for layer in former}
    modules = [path for path, _ in plain_modules(model) if path not in holders]
    if isinstance(wanted, str):
        rest = names_of(matching_paths("target_modules", modules, wanted), modules, ())
    else:
        of_experts = [name for name in wanted if any(ends_with(path, name) for path in named)]
        rest = [name for name in wanted if name not in of_experts or any(ends_with(path, name) for path in modules)]
    try:
        _retarget(model, config, chosen, rest)
    except ConfigError as error:
        reason = _why_not(chosen[0], error)
        raise ConfigError(Bilingual(f"target_modules: {reason}", f"target_modules 中，{reason.zh}")) from None


# ---- a file ----


def by_present_names(
    model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], *, source: str
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and the tensors of an adapter's file, in which the layers of experts may have their former names.

    Without training, dropout has no effect and is left out: there is none on parameters.

    Args:
        source: The file's folder, for errors.

    Raises:
        AdapterError: The file has some of the layers that are one tensor now, and not the others, or they do not fit
            together, or a setting does not work on parameters.
    """
    in_file = {key.removeprefix(START).partition(".lora_")[0] for key in tensors if ".lora_" in key}
    modules = dict(plain_modules(model))
    if all(path in modules and is_linear(modules[path]) for path in in_file):
        return config, tensors  # without the names of a thousand experts
    former = former_layers(model)
    chosen = _not_yet_parameters(config, [layer for layer in former if layer.path in in_file])
    if not chosen:
        return config, tensors
    if (lacking := _lacking(chosen, former)) is not None:
        raise AdapterError(Bilingual(f"{source}: {lacking}", f"{source}：{lacking.zh}"))
    config = copy.deepcopy(config)
    if config.inference_mode:
        config.lora_dropout = 0.0
    others = in_file - {layer.path for layer in chosen}
    layers = [path for path in modules if path in others]
    rest: list[str] | str = names_of(layers, modules, ())
    if isinstance(config.target_modules, list):
        rest = [name for name in config.target_modules if any(ends_with(path, name) for path in layers)]
    try:
        _retarget(model, config, chosen, rest)
    except ConfigError as error:
        reason = _why_not(chosen[0], error)
        raise AdapterError(Bilingual(f"{source}: {reason}", f"{source}：{reason.zh}")) from None
    return config, _as_parameters(tensors, chosen, source)


def tensors_by_present_names(
    model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], *, source: str
) -> dict[str, Tensor]:
    """The tensors of a file for an adapter that is on the parameters already: as `by_present_names`."""
    names = config.target_parameters or ()
    layers = [layer for layer in former_layers(model) if any(ends_with(layer.parameter, name) for name in names)]
    return _as_parameters(tensors, layers, source)


# ---- which layers ----


def _not_yet_parameters(config: LoraConfig, layers: Iterable[FormerLayer]) -> list[FormerLayer]:
    """Those whose parameters `target_parameters` does not name."""
    names = config.target_parameters or ()
    return [layer for layer in layers if not any(ends_with(layer.parameter, name) for name in names)]


def _lacking(chosen: Sequence[FormerLayer], former: Sequence[FormerLayer]) -> Bilingual | None:
    """Which layer of a parameter was not chosen, where another was; None where each parameter is whole."""
    there = {layer.path for layer in chosen}
    by_parameter = {layer.parameter: layer for layer in reversed(chosen)}
    for layer in former:
        if layer.path not in there and (one := by_parameter.get(layer.parameter)) is not None:
            return Bilingual(
                f"{_end(one)} is among the layers and {_end(layer)} is not, and they are one tensor in this model, "
                f"{layer.parameter}.",
                f"有 {_end(one)} 而没有 {_end(layer)}，它们在这个模型中是同一个张量 {layer.parameter}。",
            )
    return None


def _end(layer: FormerLayer) -> str:
    """The last parts of a layer's path: experts.3.w1."""
    return ".".join(layer.path.split(".")[-3:])


def _why_not(layer: FormerLayer, error: ConfigError) -> Bilingual:
    """Why an adapter cannot be on the parameter that has a layer now."""
    return Bilingual(
        f"{_end(layer)} is a part of {layer.parameter} in this model. {error}",
        f"{_end(layer)} 在这个模型中属于参数 {layer.parameter}。{local(message_of(error), 'zh')}",
    )


# ---- the config ----


def _retarget(model: nn.Module, config: LoraConfig, chosen: Sequence[FormerLayer], targets: list[str] | str) -> None:
    """Gives a config the parameters of the chosen layers, with their ranks and scalings, and `targets`.

    Raises:
        ConfigError: As of `move_experts`.
    """
    found = _ranks_and_alphas(config, chosen)
    endings = _endings(found, [path for path, _ in parameter_paths(model)])
    ranks = {path: r for path, (r, _) in found.items()}
    alphas = {path: alpha for path, (_, alpha) in found.items()}
    config.target_modules = targets
    config.target_parameters = sorted({*(config.target_parameters or ()), *endings.values()})
    gone = [layer.path for layer in chosen]
    there = [path for path, _ in (*plain_modules(model), *parameter_paths(model))]
    rank_pattern = _of_present("rank_pattern", config.rank_pattern, gone, there)
    alpha_pattern = _of_present("alpha_pattern", config.alpha_pattern, gone, there)
    config.rank_pattern = _with_values("rank_pattern", rank_pattern, ranks, config.r, endings)
    config.alpha_pattern = _with_values("alpha_pattern", alpha_pattern, alphas, config.lora_alpha, endings)
    config.__post_init__()  # parameters do not go with every setting


def _of_present(field: str, patterns: Mapping[str, N], gone: Sequence[str], there: Sequence[str]) -> dict[str, N]:
    """The patterns without those that only match layers that are gone; what matches nothing stays, and is an error."""

    def matches(key: str, paths: Sequence[str]) -> bool:
        return bool(LayerPatterns(field, {key: patterns[key]}, paths).values)

    return {key: value for key, value in patterns.items() if not matches(key, gone) or matches(key, there)}


def _ranks_and_alphas(config: LoraConfig, chosen: Sequence[FormerLayer]) -> dict[str, tuple[int, float]]:
    """R and alpha of each parameter.

    Raises:
        ConfigError: Its experts have different ranks, or its layers different scalings.
    """
    paths = [layer.path for layer in chosen]
    ranks = LayerPatterns("rank_pattern", config.rank_pattern, paths).values
    alphas = LayerPatterns("alpha_pattern", config.alpha_pattern, paths).values
    found: dict[str, tuple[int, float]] = {}
    for parameter, layers in groupby(chosen, key=lambda layer: layer.parameter):
        experts = [
            [(ranks.get(one.path, config.r), alphas.get(one.path, config.lora_alpha)) for one in parts]
            for _, parts in groupby(layers, key=lambda layer: layer.expert)
        ]
        scalings = {alpha / (math.sqrt(r) if config.use_rslora else r) for parts in experts for r, alpha in parts}
        if len(scalings) > 1 or any(parts != experts[0] for parts in experts):
            raise ConfigError(
                Bilingual(
                    "rank_pattern or alpha_pattern gives parts of one tensor different ranks or scalings. Name the "
                    "parameter itself there, or leave them out.",
                    "rank_pattern 或 alpha_pattern 给同一个张量的各部分设了不同的秩或缩放系数。"
                    "请在其中写出参数本身，或去掉它们。",
                )
            )
        R = sum(r for r, _ in experts[0])
        alpha = scalings.pop() * math.sqrt(R) if config.use_rslora else sum(alpha for _, alpha in experts[0])
        found[parameter] = R, alpha
    return found


def _endings(parameters: Collection[str], paths: Sequence[str]) -> dict[str, str]:
    """For each of some parameters the shortest ending of its path that means none but them.

    Args:
        paths: Of all parameters.
    """

    def shortest(path: str) -> str:
        parts = path.split(".")
        endings = (".".join(parts[-n:]) for n in range(1, len(parts)))
        own = (end for end in endings if all(other in parameters for other in paths if ends_with(other, end)))
        return next(own, path)

    return {path: shortest(path) for path in parameters}


def _with_values(
    field: str, patterns: Mapping[str, N], values: Mapping[str, N], usual: N, endings: Mapping[str, str]
) -> dict[str, N]:
    """Patterns that give these values to parameters: what is new has PEFT's form, and comes first.

    Args:
        values: By the parameters' paths.
        usual: What a parameter has that no pattern matches.
    """
    now = LayerPatterns(field, patterns, list(values)).values
    new: dict[str, N] = {}
    for end in dict.fromkeys(endings.values()):
        own = {path: value for path, value in values.items() if endings[path] == end}
        if all(now.get(path, usual) == value for path, value in own.items()):
            continue
        if end in own or len(set(own.values())) > 1:
            new |= {f"^{re.escape(path)}$": value for path, value in own.items()}
        else:
            new[rf".*\.{re.escape(end)}"] = next(iter(own.values()))
    return new | dict(patterns)


# ---- the tensors ----


def _as_parameters(tensors: dict[str, Tensor], layers: Sequence[FormerLayer], source: str) -> dict[str, Tensor]:
    """The tensors of a file, with A and B of parameters in the place of those of their former layers.

    Args:
        layers: In the order of `former_layers`. A parameter of which the file lacks a layer stays as it is.

    Raises:
        AdapterError: The layers of a parameter do not fit together.
    """
    keys: dict[tuple[str, str], str] = {}
    for key in tensors:
        path, _, factor = key.removeprefix(START).rpartition(".lora_")
        keys[path, factor] = key
    found = dict(tensors)
    whole: dict[str, list[FormerLayer]] = {}
    for parameter, parts in groupby(layers, key=lambda layer: layer.parameter):
        own = list(parts)
        if all((layer.path, factor) in keys for layer in own for factor in ("A.weight", "B.weight")):
            whole[parameter] = own
    for parameter, parts in whole.items():
        after = [other for other, others in whole.items() if others[0].module == parts[0].module]
        inner = "base_layer." * (len(after) - 1 - after.index(parameter))  # PEFT's wrappers, one around the other
        start = START if keys[parts[0].path, "A.weight"].startswith(START) else ""
        A, B = ([found.pop(keys[layer.path, factor]) for layer in parts] for factor in ("A.weight", "B.weight"))
        _check_shapes(parts, A, B, source)
        experts = [
            torch.block_diag(*(b for _, b in pairs))
            for _, pairs in groupby(zip(parts, B, strict=True), key=lambda pair: pair[0].expert)
        ]
        key = f"{start}{parts[0].module}.{inner}lora"
        found[f"{key}_A.weight"] = torch.cat(A)
        found[f"{key}_B.weight"] = torch.stack(experts).permute(1, 2, 0).flatten(1)
    return found


def _check_shapes(parts: Sequence[FormerLayer], A: Sequence[Tensor], B: Sequence[Tensor], source: str) -> None:
    """
    Raises:
        AdapterError: A factor has not the shape of its place in the parameter, or not that of the other experts.
    """
    first = {layer.start: a.shape for layer, a in zip(reversed(parts), reversed(A), strict=True)}
    for layer, a, b in zip(parts, A, B, strict=True):
        fits = a.dim() == 2 and a.shape == first[layer.start] and a.shape[1] == A[0].shape[-1]
        if not fits or b.shape != (layer.rows, len(a)):
            raise AdapterError(
                Bilingual(
                    f"{source}: {layer.path} has A {tuple(a.shape)} and B {tuple(b.shape)}, which fit neither the "
                    f"{layer.rows} rows that it has of {layer.parameter}, nor the other experts. Is it an adapter of "
                    "another base model?",
                    f"{source}：{layer.path} 的 A 是 {tuple(a.shape)}，B 是 {tuple(b.shape)}，与它在 {layer.parameter} "
                    f"中的 {layer.rows} 行或其他专家不符。它是不是别的基座模型的适配器？",
                )
            )
