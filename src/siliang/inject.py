"""Finds the targets, wraps them, freezes the rest, and can undo it all: the only file that changes a base model."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from siliang.methods import BitFitConfig, HeadConfig, LoraConfig, method_of
from siliang.methods.base import LayerConfig, WrappedLayer, trained_dtype
from siliang.methods.bitfit import bias_names, is_bias
from siliang.methods.targets import LORA_TARGETS
from siliang.types import TargetError, TaskType, nearest

# The heads that are new, and so trained and saved by themselves, for each task.
TASK_HEADS: dict[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


class Injection(nn.Module):
    """A base model, and everything that has been attached inside it.

    It stands between PeftModel and the base model so that parameters are called `base_model.model.<path>`, as in PEFT.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.active: tuple[str, ...] = ()
        self._swaps: dict[str, Swap] = {}
        self._was_trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        for p in model.parameters():
            p.requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet: without this line the next one would ask for it for ever
                raise
            return getattr(self.model, name)

    def add_adapter(self, name: str, config: LayerConfig, *, lenient: bool = False) -> None:
        """Attaches a new, inactive adapter; what the config leaves open (targets, heads) is filled in there.

        Args:
            lenient: Some of several target names may match nothing, as in files that PEFT wrote.

        Raises:
            TargetError: The targets are not in the model. Nothing has been changed then.
        """
        heads = TASK_HEADS.get(config.task_type, ()) if config.task_type else ()
        wanted = list(config.modules_to_save or ())
        saved = find_saved_modules(self.model, [*wanted, *heads], required=[] if lenient else wanted)
        if heads:
            config.modules_to_save = sorted({*wanted, *heads})
        layers: list[str] = []
        biases: list[str] = []
        if isinstance(config, HeadConfig):
            if not saved:
                raise TargetError("Training the head alone needs a head: task SEQ_CLS, TOKEN_CLS or QUESTION_ANS.")
        elif isinstance(config, BitFitConfig):
            biases = [b for b in bias_names(self.model) if not _inside(b, saved)]
            if not biases:
                raise TargetError(no_biases(self.model))
        else:
            assert isinstance(config, LoraConfig)
            layers = find_targets(self.model, config, outside=saved, lenient=lenient)
            biases = _lora_biases(self.model, config, layers, saved)
        layer_class = method_of(config).layer
        for path in layers:
            layer = self.model.get_submodule(path)
            if not isinstance(layer, WrappedLayer):
                assert layer_class is not None
                layer = layer_class(layer)
                layer.train(layer.base_layer.training)
                _replace(self.model, path, layer)
            layer.add_adapter(name, **config.layer_arguments(path))  # type: ignore[attr-defined]
        for path in biases:
            swap = self._swaps.setdefault(path, Swap.of(self.model, path))
            swap.adapters[name] = nn.Parameter(swap.original.detach().clone(), requires_grad=False)
        for path in saved:
            module = self.model.get_submodule(path)
            if not isinstance(module, SavedModule):
                module = SavedModule(module)
                _replace(self.model, path, module)
            module.add_adapter(name)

    def set_active(self, *names: str) -> None:
        """Makes the named adapters, none or several, the ones that compute."""
        self.active = names
        for module in self.model.modules():
            if isinstance(module, WrappedLayer):
                module.active = names
            elif isinstance(module, SavedModule):
                module.active = next((n for n in names if n in module.modules_to_save), None)
        for swap in self._swaps.values():
            swap.put(next((n for n in names if n in swap.adapters), None))

    def train_only(self, *names: str) -> None:
        """Sets requires_grad on the parameters of the named adapters and on nothing else."""
        for p in self.parameters():
            p.requires_grad_(False)
        for name in names:
            for p in self.adapter_parameters(name).values():
                p.requires_grad_(True)

    def adapter_tensors(self, name: str) -> dict[str, Tensor]:
        """What adapter `name` consists of, live, under the keys of the file (INTEROP: without the adapter's name)."""
        found: dict[str, Tensor] = {}
        for path, module in self.model.named_modules():
            if isinstance(module, WrappedLayer):
                found |= {f"{path}.{key}": p for key, p in module.adapter_parameters(name).items()}
            elif isinstance(module, SavedModule) and name in module.modules_to_save:
                state = module.modules_to_save[name].state_dict(keep_vars=True)
                found |= {f"{path}.{key}": t for key, t in state.items()}
        wrapped = {path for path, m in self.model.named_modules() if isinstance(m, WrappedLayer)}
        for path, swap in self._swaps.items():
            if name in swap.adapters:
                owner, _, own = path.rpartition(".")
                key = f"{owner}.base_layer.{own}" if owner in wrapped else path
                found[key] = swap.adapters[name]
        return {f"base_model.model.{key}": tensor for key, tensor in found.items()}

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The trained part of `adapter_tensors`: without the buffers of saved modules."""
        return {k: t for k, t in self.adapter_tensors(name).items() if isinstance(t, nn.Parameter)}

    def unload(self, merge: str | None = None) -> nn.Module:
        """Takes everything off again and returns the base model: as it was, bit for bit, or with one adapter merged."""
        self.set_active(*((merge,) if merge else ()))
        for path, module in list(self.model.named_modules()):
            if isinstance(module, WrappedLayer):
                if merge:
                    module.merge(merge)
                _replace(self.model, path, module.base_layer)
            elif isinstance(module, SavedModule):
                _replace(self.model, path, module.current)
        for name, p in self.model.named_parameters():
            p.requires_grad_(self._was_trainable.get(name, True))
        self._swaps.clear()
        return self.model


class SavedModule(nn.Module):
    """A module of the base model (a head, an embedding) of which each adapter trains and saves a copy of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.active: str | None = None
        self.train(module.training)

    def add_adapter(self, name: str) -> None:
        """Copies the original for adapter `name`, in fp32 where it is in half precision."""
        twin = copy.deepcopy(self.original_module)
        for p in twin.parameters():
            p.data = p.data.to(trained_dtype(p))
        self.modules_to_save[name] = twin

    @property
    def current(self) -> nn.Module:
        return self.original_module if self.active is None else self.modules_to_save[self.active]

    @property
    def weight(self) -> Tensor:  # of a head or an embedding that other modules look into
        return self.current.weight  # type: ignore[return-value]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        module = self.current
        if x.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
            x = x.to(next(module.parameters()).dtype)
        return module(x, *args, **kwargs)


@dataclass
class Swap:
    """A parameter of the base model that adapters put others in the place of.

    Attributes:
        sites: Every (module, attribute) that holds it: one, or several where it is tied.
    """

    original: nn.Parameter
    sites: list[tuple[nn.Module, str]]
    adapters: dict[str, nn.Parameter] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, path: str) -> Swap:
        original = model.get_parameter(path)
        sites = [
            (module, attribute)
            for module in model.modules()
            for attribute, p in module.named_parameters(recurse=False, remove_duplicate=False)
            if p is original
        ]
        return cls(original, sites)

    def put(self, name: str | None) -> None:
        """Puts adapter `name`'s parameter, or the original, where the model reads it."""
        chosen = self.original if name is None else self.adapters[name]
        module, attribute = self.sites[0]
        standing = getattr(module, attribute)
        # those put aside do not move with the model
        chosen.data = chosen.data.to(device=standing.device)
        for module, attribute in self.sites:
            setattr(module, attribute, chosen)


def find_targets(model: nn.Module, config: LoraConfig, *, outside: list[str], lenient: bool) -> list[str]:
    """The paths of the layers that `config` means; fills in its `target_modules` where it is None.

    Raises:
        TargetError: A name or the regex matches nothing, or a match is no layer that the method can wrap.
    """
    layer_class = method_of(config).layer
    assert layer_class is not None
    modules = dict(plain_modules(model))
    fitting = [p for p, m in modules.items() if layer_class.supports(m) and not _inside(p, outside)]
    if config.target_modules is None:
        config.target_modules = default_targets(model, fitting)
    wanted = config.target_modules
    if wanted == "all-linear":
        head = _output_embedding(model)
        found = [p for p in fitting if modules[p] is not head]
        # PEFT saves the names themselves, so that the file means the same on a model with other linear layers
        config.target_modules = sorted({p.rpartition(".")[2] for p in found})
    elif isinstance(wanted, str):
        try:
            found = [p for p in modules if re.fullmatch(wanted, p)]
        except re.error as error:
            raise TargetError(f"target_modules = {wanted!r} is no regular expression: {error}.") from error
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
    found = [p for p in found if not _excluded(p, config.exclude_modules) and _in_chosen_layers(p, config)]
    found = [p for p in found if not _inside(p, outside)]
    if not found:
        raise TargetError("target_modules match nothing once exclude_modules and layers_to_transform are applied.")
    if strange := [p for p in found if not layer_class.supports(modules[p])]:
        kind = type(modules[strange[0]]).__name__
        raise TargetError(f"target_modules: {strange[0]!r} is a {kind}, which {config.peft_type} cannot wrap.")
    return found


def default_targets(model: nn.Module, fitting: list[str]) -> list[str]:
    """The usual targets for the model's type, and an error that lists what there is where the type is unknown."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in LORA_TARGETS:
        return list(LORA_TARGETS[model_type])
    endings = sorted({p.rpartition(".")[2] for p in fitting})
    raise TargetError(
        f"No default target_modules are known for model type {model_type!r}: name them, or say 'all-linear'. "
        f"Layers that can be tuned: {', '.join(endings) or 'none'}."
    )


def find_saved_modules(model: nn.Module, names: list[str], *, required: list[str]) -> list[str]:
    """The outermost modules whose path ends in one of `names`.

    Raises:
        TargetError: One of `required` matches nothing.
    """
    paths = [p for p, _ in plain_modules(model) if p]
    for name in required:
        if not any(_ends(p, name) for p in paths):
            hint = nearest(name, {p.rpartition(".")[2] for p in paths})
            raise TargetError(f"modules_to_save: {name!r} matches no module of {type(model).__name__}.{hint}")
    found = [p for p in paths if any(_ends(p, name) for name in names)]
    return [p for p in found if not _inside(p, [other for other in found if other != p])]


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base model under their own paths, as if nothing were attached."""

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(module, WrappedLayer):
            module = module.base_layer
        elif isinstance(module, SavedModule):
            module = module.original_module
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


def _lora_biases(model: nn.Module, config: LoraConfig, layers: list[str], saved: list[str]) -> list[str]:
    """The base biases that LoRA's `bias` setting trains along, under their plain names."""
    if config.bias == "none":
        return []
    everywhere = [
        f"{path}.{name}" if path else name
        for path, module in plain_modules(model)
        for name, _ in module.named_parameters(recurse=False)
        if is_bias(name)
    ]
    everywhere = [b for b in everywhere if not _inside(b, saved)]
    if config.bias == "all":
        return everywhere
    return [b for b in everywhere if b.rpartition(".")[0] in layers]


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _inside(path: str, roots: list[str]) -> bool:
    return any(path == root or path.startswith(root + ".") for root in roots)


def _excluded(path: str, exclude: list[str] | str | None) -> bool:
    if exclude is None:
        return False
    if isinstance(exclude, str):
        return re.fullmatch(exclude, path) is not None
    return any(_ends(path, name) for name in exclude)


def _in_chosen_layers(path: str, config: LoraConfig) -> bool:
    """Whether the block index in `path` is one of layers_to_transform: the first number after the pattern's name."""
    chosen = config.layers_to_transform
    if chosen is None:
        return True
    chosen = [chosen] if isinstance(chosen, int) else chosen
    patterns = config.layers_pattern
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns or [r"[^.]*"]:
        if found := re.match(rf".*\.{pattern}\.(\d+)\.", "." + path):
            return int(found[1]) in chosen
    return False


def _output_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def _samples(paths: list[str]) -> str:
    return ", ".join(map(repr, paths[:3])) or "(none)"
