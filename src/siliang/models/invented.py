"""The modules of a model that its files do not have, so that loading initializes them: new heads, poolers."""

from __future__ import annotations

from contextlib import suppress

from torch import nn

from siliang.module_paths import inside, outermost, parameter_paths

READ = "_is_hf_initialized"  # the attribute that transformers sets on a parameter that was read from files


def invented_modules(model: nn.Module) -> list[str]:
    """The outermost modules whose weights are not in the model's files, so that loading initialized them: new heads,
    and other modules between the layers and the head, such as the pooler of a BERT that was trained without one.

    transformers marks the parameters that it has read (`READ`). A model without marks (made from a config, or copied),
    or with blocks without marks (whose parameters were replaced), gives an empty list.
    """
    parameters = dict(parameter_paths(model))
    missing = {name for name, p in parameters.items() if not getattr(p, READ, False)}
    if len(missing) == len(parameters):
        return []
    missing -= (ends := embedding_weights(model))  # which may have been resized
    if not all(may_be_invented(model, name, ends) for name in missing):
        return []
    return _owners(list(parameters), missing)


def mark_invented(model: nn.Module, modules: list[str]) -> None:
    """Marks a model that was made from a config, as if files had all weights except those of `modules`."""
    for name, p in model.named_parameters():
        if modules and not inside(name, modules):
            setattr(p, READ, True)


def may_be_invented(model: nn.Module, name: str, ends: set[str]) -> bool:
    """Whether the parameter belongs to a head or a pooler, which may be missing in files. Any other missing parameter
    means that the model is damaged.

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


def embedding_weights(model: nn.Module) -> set[str]:
    """The names of the weights of the input and output embeddings."""
    found = set()
    for end in ("input", "output"):
        with suppress(AttributeError, NotImplementedError):
            module = getattr(model, f"get_{end}_embeddings")()
            paths = [path for path, m in model.named_modules() if m is module]
            found |= {f"{path}.{name}" for path in paths for name, _ in module.named_parameters()}
    return found


def _owners(parameters: list[str], missing: set[str]) -> list[str]:
    """The outermost modules whose parameters are all `missing`, or the innermost modules with some of them."""

    def lacks_all(path: str) -> bool:
        return all(name in missing for name in parameters if name.startswith(path + "."))

    owners = set()
    for name in missing:
        path = name.rpartition(".")[0]
        while (outer := path.rpartition(".")[0]) and lacks_all(outer):
            path = outer
        owners.add(path)
    return sorted(outermost(owners))
