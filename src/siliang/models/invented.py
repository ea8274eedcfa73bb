"""What of a model its files do not hold, so that loading made it up at random: new heads, poolers."""

from __future__ import annotations

from contextlib import suppress

from torch import nn

from siliang.module_paths import inside, outermost, parameter_paths

READ = "_is_hf_initialized"  # transformers' mark on a parameter that was read from the files


def invented_modules(model: nn.Module) -> list[str]:
    """The outermost modules whose weights the model's files do not hold, so that loading made them up: new heads, and
    whatever else stands between the layers and the head, such as the pooler of a BERT that was trained without one.

    transformers marks what it has read (`READ`). A model that was made from a config, or copied, has no
    marks, and nothing is known of it; nor where blocks inside of it have none, as when their parameters were replaced.
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
    """Marks a model that was made from a config as if files had held all but `modules`."""
    for name, p in model.named_parameters():
        if modules and not inside(name, modules):
            setattr(p, READ, True)


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
    """The outermost modules all of whose parameters are `missing`, or the innermost that hold some of them."""

    def lacks_all(path: str) -> bool:
        return all(name in missing for name in parameters if name.startswith(path + "."))

    owners = set()
    for name in missing:
        path = name.rpartition(".")[0]
        while (outer := path.rpartition(".")[0]) and lacks_all(outer):
            path = outer
        owners.add(path)
    return sorted(outermost(owners))
