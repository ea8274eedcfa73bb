"""The paths of a model's modules, and the paths that names and patterns match."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from siliang.safety.patterns import find


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a base model without adapters; a shared module has each of its paths."""

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        yield path, module
        for name, child in module.named_children():
            yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, "")


def parameter_paths(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a base model without adapters; a shared parameter has each of its paths."""
    for path, module in plain_modules(model):
        for name, p in module.named_parameters(recurse=False):
            yield f"{path}.{name}" if path else name, p


def inside(path: str, roots: Iterable[str]) -> bool:
    """Whether `path` is one of `roots`, or within one."""
    return any(path == root or path.startswith(root + ".") for root in roots)


def outermost(paths: Iterable[str]) -> list[str]:
    """The paths that are within none of the others."""
    paths = list(dict.fromkeys(paths))
    return [p for p in paths if not inside(p, [other for other in paths if other != p])]


def ends_with(path: str, name: str) -> bool:
    """Whether the last parts of a path are `name`."""
    return path == name or path.endswith("." + name)


def matching_paths(field: str, paths: Sequence[str], names: Sequence[str] | str | None) -> list[str]:
    """The paths that match.

    Args:
        field: The setting with the names, for errors.
        names: A list of endings, or a regular expression for the whole path.

    Raises:
        TargetError: The pattern is not a regular expression, or takes too long to match.
    """
    if isinstance(names, str):
        (matches,) = find(field, [names], paths, whole=True)
        return [path for path, groups in zip(paths, matches, strict=True) if groups is not None]
    return [path for path in paths if any(ends_with(path, name) for name in names or ())]
