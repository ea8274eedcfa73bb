"""Weights that a base model holds in several places, and putting others in their places."""

from __future__ import annotations

from typing import Any

from torch import nn


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def replace_parameter(model: nn.Module, path: str, parameter: nn.Parameter) -> None:
    """Puts `parameter` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, parameter)


def untie(model: Any) -> None:
    """Where merging parted weights that were tied, gives each place a weight of its own and says so in the config.

    Otherwise saving would leave those out that still are one, and loading tie them to another, or draw them at random.
    Some configs (T5's) read `tie_word_embeddings` as something else and always tie; loading leaves weights apart that
    the files hold apart.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    pairs = {a: b for a, b in tied.items() if a in parameters and b in parameters}
    if all(parameters[a] is parameters[b] for a, b in pairs.items()):
        return
    seen: set[int] = set()
    for path in dict.fromkeys((*pairs.values(), *pairs)):
        p = parameters[path]
        if id(p) in seen:
            replace_parameter(model, path, nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))
        seen.add(id(p))
    model.all_tied_weights_keys = {a: b for a, b in tied.items() if a not in pairs}
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if not type(config).from_dict(config.to_dict() | {"tie_word_embeddings": False}).tie_word_embeddings:
            config.tie_word_embeddings = False
