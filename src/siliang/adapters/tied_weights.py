"""Weights that a base model holds in several places, and replacing modules and parameters by their paths."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def replace_parameter(model: nn.Module, path: str, parameter: nn.Parameter) -> None:
    """Puts `parameter` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, parameter)


def retie_or_untie(model: nn.Module) -> None:
    """After a merge into weights that were tied: where they are equal they are one parameter again; otherwise each
    place has a weight of its own, and the config is changed accordingly.

    Without the latter saving would leave out those that still are one, and loading would tie them to another, or
    initialize them at random. Some configs (T5's) read `tie_word_embeddings` as something else and always tie; loading
    leaves weights untied that the files hold apart.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    pairs = {a: b for a, b in tied.items() if a in parameters and b in parameters}
    for a, b in pairs.items():
        if parameters[a] is not parameters[b] and _equal(parameters[a], parameters[b]):
            replace_parameter(model, a, parameters[b])
            parameters[a] = parameters[b]
    if all(parameters[a] is parameters[b] for a, b in pairs.items()):
        return
    seen: set[int] = set()
    for path in dict.fromkeys((*pairs.values(), *pairs)):
        p = parameters[path]
        if id(p) in seen:
            replace_parameter(model, path, nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))
        seen.add(id(p))
    cast(PreTrainedModel, model).all_tied_weights_keys = {a: b for a, b in tied.items() if a not in pairs}
    config = getattr(model, "config", None)
    assert isinstance(config, PretrainedConfig)
    for one in {id(c): c for c in (config, config.get_text_config())}.values():
        if not type(one).from_dict(one.to_dict() | {"tie_word_embeddings": False}).tie_word_embeddings:
            one.tie_word_embeddings = False


def _equal(a: nn.Parameter, b: nn.Parameter) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and not a.is_meta and torch.equal(a, b)
