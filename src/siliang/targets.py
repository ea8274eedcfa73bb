"""Which modules of a base model a config means, and errors with near names where it means none."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from torch import nn

from siliang.methods import method_of
from siliang.methods.base import LayerConfig, PeftConfig
from siliang.methods.bitfit import is_bias
from siliang.methods.lora import LoraConfig, Patterns
from siliang.models.introspect import is_linear, output_layer
from siliang.patterns import find
from siliang.types import ConfigError, TargetError, nearest


def find_targets(model: nn.Module, config: LayerConfig, *, outside: list[str], lenient: bool) -> list[str]:
    """The paths of the layers that `config` means; fills in its `target_modules` where it is None.

    Raises:
        TargetError: A name or the regex matches nothing, or a match is no layer that the method can wrap.
    """
    kinds = method_of(config).layers
    modules = dict(plain_modules(model))
    fitting = [p for p, m in modules.items() if any(k.supports(m) for k in kinds) and not inside(p, outside)]
    if config.target_modules is None:
        config.target_modules = default_targets(model, config, fitting)
    if not lenient:
        _check_names(config, list(modules))
    config.use_defaults_of(getattr(getattr(model, "config", None), "model_type", None))
    wanted = config.target_modules
    if not wanted:
        raise TargetError("target_modules is empty: name layers, or leave it out for the usual ones of the model.")
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        head = output_layer(model)
        found = [p for p in fitting if modules[p] is not head and is_linear(modules[p])]
        if experts := _experts(modules):
            warnings.warn(
                f"target_modules='all-linear' leaves out {', '.join(experts)}: these hold weights, and are no linear "
                "layers. PEFT tunes them on some models (target_parameters), siliang does not.",
                stacklevel=2,  # one place, and so once
            )
        # PEFT saves the names themselves, so that the file means the same on a model with other linear layers
        config.target_modules = _names_of([p for p in found if not inside(p, outside)], modules, outside)
    elif isinstance(wanted, str):
        found = _matched("target_modules", wanted, list(modules))
        if not found:
            raise TargetError(f"target_modules = {wanted!r} matches no module. The names are like {_samples(fitting)}.")
    else:
        missing = [name for name in wanted if not any(_ends(p, name) for p in modules)]
        if missing and not (lenient and len(missing) < len(wanted)):
            endings = {p.rpartition(".")[2] for p in fitting}
            hint = nearest(missing[0], endings)
            raise TargetError(
                f"target_modules: {', '.join(map(repr, missing))} matches no module of {type(model).__name__}.{hint} "
                f"Layers that can be tuned: {', '.join(sorted(endings)) or 'none'}."
            )
        found = [p for p in modules if any(_ends(p, name) for name in wanted)]
    chosen = _chosen_layers(config, list(modules), lenient=lenient)
    excluded = set(_meant("exclude_modules", found, config.exclude_modules))
    found = [p for p in found if p not in excluded]
    if chosen is not None:
        found = [p for p, index in zip(found, _layer_indices(found, config), strict=True) if index in chosen]
    saved = found if found else outside if config.target_modules == [] else []  # all-linear looks outside of them alone
    found = [p for p in found if not inside(p, outside)]
    if saved and not found:
        raise TargetError(f"modules_to_save ({', '.join(outside[:3])}) holds all that target_modules matches.")
    if not found:
        raise TargetError("target_modules match nothing once exclude_modules and layers_to_transform are applied.")
    if strange := [p for p in found if p not in fitting]:
        module = modules[strange[0]]
        kind = type(module).__name__
        if next(module.children(), None) is None and hasattr(module, "weight"):
            kind += " and no linear layer"
        what = f"{strange[0]!r} is" if strange[0] else "the whole model is"
        way = ""
        if isinstance(wanted, str):
            way = " End the pattern with the layers' own names, as in .*(q_proj|v_proj), or use a list, or all-linear."
        raise TargetError(f"target_modules: {what} a {kind}, which {config.peft_type} cannot wrap.{way}")
    return found


def layer_arguments(config: LayerConfig, layers: list[str], *, lenient: bool = False) -> dict[str, dict[str, Any]]:
    """What the wrapped layer of each path needs; rewrites patterns whose order would matter in the config's file.

    Args:
        lenient: Patterns may match nothing, as in files that PEFT wrote.

    Raises:
        TargetError: A pattern matches nothing, is no regular expression, or takes too long to match.
        ConfigError: With the settings nothing could be trained.
    """
    if not layers:
        return {}
    if isinstance(config, LoraConfig):
        if config.lora_dropout == 1.0 and not lenient:
            raise ConfigError("lora_dropout = 1.0: must be less than 1, or nothing is trained.")
        for name, given in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
            patterns = Patterns(name, given, layers)
            if not lenient and (idle := patterns.without_effect):
                hint = nearest(idle[0], {p.rpartition(".")[2] for p in layers}) or nearest(idle[0], layers)
                raise TargetError(
                    f"{name}: {idle[0]!r} matches none of the layers that are tuned.{hint} "
                    f"They are like {_samples(layers)}."
                )
            setattr(config, name, patterns.in_any_order())
    return dict(zip(layers, config.layer_arguments(layers), strict=True))


def _experts(modules: dict[str, nn.Module]) -> list[str]:
    """The weights of experts that stand in one tensor, and of the routers to them, by the ends of their names."""
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


def _names_of(found: list[str], modules: Iterable[str], outside: list[str]) -> list[str] | str:
    """Names that mean just the layers of `found`: their last part where it means no other, otherwise the whole."""
    chosen = set(found)
    others = [p for p in modules if p not in chosen and not inside(p, outside)]

    def own(name: str) -> bool:
        return not name.isdigit() and not any(_ends(p, name) for p in others)

    names = sorted({last if own(last := path.rpartition(".")[2]) else path for path in found})
    if any(_ends(other, name) for other in others for name in names):  # "0" at the root is in every list
        return "|".join(re.escape(path) for path in found)
    return names


def default_targets(model: nn.Module, config: LayerConfig, fitting: list[str]) -> list[str]:
    """The usual targets for the model's type, and an error that lists what there is where the type is unknown."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in config.DEFAULT_TARGETS:
        return list(config.DEFAULT_TARGETS[model_type])
    endings = sorted({p.rpartition(".")[2] for p in fitting})
    linear = any(is_linear(model.get_submodule(p)) for p in fitting)
    way = "set target_modules: all-linear, or name some" if linear else "name them in target_modules"
    raise TargetError(
        f"No default target_modules of {config.peft_type} are known for model type {model_type!r}: {way}. "
        f"Layers that can be tuned: {', '.join(endings) or 'none'}."
    )


def _check_names(config: LayerConfig, paths: list[str]) -> None:
    """What is named beside the targets must be there, or it would have no effect.

    Raises:
        TargetError: A name or regular expression of exclude_modules or feedforward_modules matches nothing.
    """
    for field in ("exclude_modules", "feedforward_modules"):
        named = getattr(config, field, None) or []
        for name in [named] if isinstance(named, str) else named:
            if not _meant(field, paths, name if isinstance(named, str) else [name]):
                hint = nearest(name, {p.rpartition(".")[2] for p in paths})
                raise TargetError(f"{field}: {name!r} matches no module of the model.{hint}")


def find_saved_modules(model: nn.Module, names: list[str], *, required: list[str], nested: bool = True) -> list[str]:
    """The outermost modules whose path ends in one of `names`, dot or no dot: PEFT's rule (`head` means lm_head too).

    Args:
        nested: Matches within a match are left to the outer one. PEFT trains that one, and writes the inner one.

    Raises:
        TargetError: One of `required` matches nothing; a match is a list of modules, which does not compute, or, unless
            `nested`, lies within another.
    """
    modules = {p: m for p, m in plain_modules(model) if p}
    paths = list(modules)
    for name in required:
        if not any(_ends_in(p, name) for p in paths):
            hint = nearest(name, {p.rpartition(".")[2] for p in paths})
            raise TargetError(f"modules_to_save: {name!r} matches no module of {type(model).__name__}.{hint}")
    matches = [p for p in paths if any(_ends_in(p, name) for name in names)]
    found = _outermost(matches)
    if not nested and (within := [p for p in matches if p not in found]):
        raise TargetError(
            f"modules_to_save means {within[0]} and a module around it: PEFT trains the outer one and writes the inner "
            "one, so the file lacks what was trained."
        )
    for path in found:
        if isinstance(modules[path], nn.ModuleList | nn.ModuleDict):
            raise TargetError(
                f"modules_to_save: {path} is a list of modules, which does not compute: name what is in it."
            )
    return found


def names_of_saved(config: PeftConfig, names: Iterable[str], saved: list[str], paths: list[str]) -> list[str]:
    """The names of modules_to_save to write, so that PEFT finds the modules `saved` by them, and no target in these.

    PEFT puts one wrapper into another where names match within a match, and cannot read what comes of it: such names
    are left out. It keeps targets out of the modules that a whole step of the path names, and no others: where a target
    is in another one, that one's path is named too.
    """
    found = [n for n in names if not (hits := [p for p in paths if _ends_in(p, n)]) or any(p in saved for p in hits)]
    wanted = getattr(config, "target_modules", None) or []
    for path in saved:
        if any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path) for name in found):
            continue
        if _meant("target_modules", [p for p in paths if inside(p, [path])], wanted):
            found.append(path)
    return sorted(found)


def _outermost(paths: Iterable[str]) -> list[str]:
    """Those of the paths that lie in none of the others."""
    paths = list(dict.fromkeys(paths))
    return [p for p in paths if not inside(p, [other for other in paths if other != p])]


def invented_modules(model: nn.Module) -> list[str]:
    """The outermost modules whose weights the model's files do not hold, so that loading made them up: new heads, and
    whatever else stands between the layers and the head, such as the pooler of a BERT that was trained without one.

    transformers marks what it has read (`_is_hf_initialized`). A model that was made from a config, or copied, has no
    marks, and nothing is known of it; nor where blocks inside of it have none, as when their parameters were replaced.
    """
    parameters = {
        f"{path}.{name}" if path else name: p
        for path, module in plain_modules(model)
        for name, p in module.named_parameters(recurse=False)
    }
    missing = {name for name, p in parameters.items() if not getattr(p, "_is_hf_initialized", False)}
    if len(missing) == len(parameters):
        return []
    missing -= (ends := embedding_weights(model))  # which may have been resized
    if not all(may_be_invented(model, name, ends) for name in missing):
        return []
    return _owners(list(parameters), missing)


def mark_invented(model: nn.Module, modules: list[str]) -> None:
    """Marks a model that was made from a config as if files had held all but `modules`."""
    for name, p in model.named_parameters():
        if modules and not inside(name, modules):
            p._is_hf_initialized = True  # type: ignore[attr-defined]


def may_be_invented(model: nn.Module, name: str, ends: set[str]) -> bool:
    """Whether the parameter is a part of a head or a pooler, which files may lack; without any other the model is
    damaged.

    Args:
        ends: The model's `embedding_weights`.
    """
    *modules, _ = name.split(".")
    if not modules or name in ends:
        return False
    if any("pooler" in part for part in modules):
        return True
    backbone = getattr(model, "base_model_prefix", "")
    if hasattr(model, backbone or " "):
        return modules[0] != backbone
    return not any(part.isdigit() for part in modules) and modules[0] not in ("encoder", "decoder", "shared")


def embedding_weights(model: Any) -> set[str]:
    """The names of the weights of the input and output embeddings."""
    found = set()
    for end in ("input", "output"):
        with suppress(AttributeError, NotImplementedError):
            module = getattr(model, f"get_{end}_embeddings")()
            paths = [path for path, m in model.named_modules() if m is module]
            found |= {f"{path}.{name}" for path in paths for name, _ in module.named_parameters()}
    return found


def _owners(parameters: list[str], missing: set[str]) -> list[str]:
    """The outermost modules all of whose parameters are `missing`, or the innermost that hold some of them."""

    def lacks_all(path: str) -> bool:
        return all(name in missing for name in parameters if name.startswith(path + "."))

    owners = set()
    for name in missing:
        path = name.rpartition(".")[0]
        while (outer := path.rpartition(".")[0]) and lacks_all(outer):
            path = outer
        owners.add(path)
    return sorted(_outermost(owners))


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a base model, one that is shared under each of its paths. Nothing may be attached to it."""

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        yield path, module
        for name, child in module.named_children():
            yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, "")


def no_biases(model: nn.Module) -> str:
    """Why BitFit cannot work on this model, and what can."""
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return (
        f"BitFit trains biases, and this model ({model_type}) has none. "
        "Use LoRA instead: method: lora, or LoraConfig()."
    )


def lora_biases(model: nn.Module, config: LayerConfig, layers: list[str], saved: list[str]) -> list[str]:
    """The base biases that LoRA's `bias` setting trains along, under their plain names."""
    if not isinstance(config, LoraConfig) or config.bias == "none":
        return []
    everywhere = [
        f"{path}.{name}" if path else name
        for path, module in plain_modules(model)
        for name, _ in module.named_parameters(recurse=False)
        if is_bias(name)
    ]
    everywhere = [b for b in everywhere if not inside(b, saved)]
    if config.bias == "all":
        return everywhere
    return [b for b in everywhere if b.rpartition(".")[0] in layers]


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _ends_in(path: str, name: str) -> bool:
    """Whether PEFT takes `path` for one that `name` of modules_to_save means."""
    return ("base_model.model." + path).endswith(name)


def inside(path: str, roots: list[str]) -> bool:
    """Whether `path` is one of `roots`, or lies within one."""
    return any(path == root or path.startswith(root + ".") for root in roots)


def _matched(field: str, pattern: str, paths: list[str]) -> list[str]:
    """The paths that a regular expression matches whole."""
    (found,) = find(field, [pattern], paths, whole=True)
    return [path for path, groups in zip(paths, found, strict=True) if groups is not None]


def _meant(field: str, paths: list[str], named: list[str] | str | None) -> list[str]:
    """The paths that a list of endings, or a regular expression, means."""
    if isinstance(named, str):
        return _matched(field, named, paths)
    return [path for path in paths if any(_ends(path, name) for name in named or ())]


def _chosen_layers(config: LayerConfig, paths: list[str], *, lenient: bool) -> set[int] | None:
    """The numbers of layers_to_transform; None for all layers.

    Raises:
        TargetError: The model has no layer of a number, or layers_pattern names no list of layers.
    """
    if not isinstance(config, LoraConfig) or config.layers_to_transform in (None, []):
        return None
    by_pattern = _indices(_layer_patterns(config), paths)
    wanted = config.layers_to_transform
    chosen = {wanted} if isinstance(wanted, int) else set(wanted or ())
    if lenient:
        return chosen
    for pattern, found in zip(_layer_patterns(config), by_pattern, strict=True):
        if all(index is None for index in found):
            lists = {path.split(".")[-2] for path in paths if path.rpartition(".")[2].isdigit() and "." in path}
            hint = nearest(pattern, lists) or f" There are {', '.join(sorted(lists)) or 'none'}."
            raise TargetError(f"layers_pattern: {pattern!r} is the name of no list of layers in this model.{hint}")
    there = {index for index in _layer_indices(paths, config) if index is not None}
    if strange := sorted(chosen - there):
        known = f"they go from {min(there)} to {max(there)}" if there else "its layers have no numbers"
        raise TargetError(f"layers_to_transform: the model has no layer {', '.join(map(str, strange))}: {known}.")
    return chosen


def _layer_indices(paths: list[str], config: LayerConfig) -> list[int | None]:
    """The number of the model's layer that each path lies in: the first in it, for those further in count experts and
    the like; with layers_pattern the first after the pattern's name.
    """
    found = _indices(_layer_patterns(config) or [r"[^.]*"], paths)
    return [next((index for index in of_path if index is not None), None) for of_path in zip(*found, strict=True)]


def _indices(patterns: list[str], paths: list[str]) -> list[list[int | None]]:
    """For each pattern the number that follows it in each path."""
    found = find("layers_pattern", patterns, ["." + path for path in paths], around=(r".*?\.(?:", r")\.(\d+)(\.|$)"))
    return [[None if groups is None else int(groups[-2] or 0) for groups in one] for one in found]


def _layer_patterns(config: LayerConfig) -> list[str]:
    patterns = getattr(config, "layers_pattern", None) or []
    return [patterns] if isinstance(patterns, str) else patterns


def _samples(paths: list[str]) -> str:
    return ", ".join(map(repr, paths[:3])) or "(none)"
