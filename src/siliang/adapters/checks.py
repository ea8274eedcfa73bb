"""Checks that the parts of a method can be made on a model, and that adapters can be active together."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Sequence
from itertools import combinations, permutations

from torch import nn

from siliang.adapters.adapter import AttachedAdapter
from siliang.adapters.choose_modules import names_of_saved
from siliang.adapters.table_rows import check_table_rows
from siliang.language import Bilingual
from siliang.methods.config import PeftConfig
from siliang.methods.layer import LayerAdapter
from siliang.methods.method import Parts
from siliang.models.quantized import is_quantized
from siliang.module_paths import inside, plain_modules
from siliang.types import ConfigError, SiliangError


def checked_parts(
    model: nn.Module, config: PeftConfig, saved: Sequence[str], parts: Parts, *, for_prompts: bool
) -> Parts:
    """The parts that a method gave, with the modules that are saved whole, each once; the names of these go into the
    config.

    Args:
        model: The base model, nothing attached to it.
        saved: The modules that are saved whole for the task or by `modules_to_save`.
        for_prompts: The model's first adapter is a prompt.

    Raises:
        ConfigError: They cannot be made on this model.
    """
    if parts.shared and for_prompts:
        raise ConfigError(
            Bilingual(
                f"The layers of {config.peft_type} share tensors, and the model's first adapter is a prompt: "
                "attach the prompt after it.",
                f"{config.peft_type} 的各层共用张量，而模型的第一个适配器是提示类方法：请在它之后再接提示类适配器。",
            )
        )
    parts = dataclasses.replace(parts, modules=tuple(dict.fromkeys((*saved, *parts.modules))))
    if config.modules_to_save:
        paths = [path for path, _ in plain_modules(model)]
        config.modules_to_save = names_of_saved(config, config.modules_to_save, list(parts.modules), paths)
    for path in parts.modules:
        if any(is_quantized(m) for m in model.get_submodule(path).modules()):
            raise ConfigError(
                Bilingual(
                    f"modules_to_save: {path} is quantized, and a copy of it cannot be trained.",
                    f"modules_to_save：{path} 已量化，无法训练它的副本。",
                )
            )
    check_table_rows(model, parts.table_rows, (*parts.layers, *parts.modules))
    # a parameter that several layers share is trained once
    once = set({id(model.get_parameter(path)): path for path in reversed(parts.parameters)}.values())
    return dataclasses.replace(parts, parameters=tuple(path for path in parts.parameters if path in once))


def check_together(adapters: Sequence[AttachedAdapter], *, error: type[SiliangError] = ConfigError) -> None:
    """Refuses adapters of which one would replace another, or a part of it.

    Args:
        error: What is raised.
    """
    for one, other in combinations(adapters, 2):
        if one.name == other.name:
            raise error(Bilingual(f"adapter {one.name!r} is named twice.", f"适配器 {one.name!r} 写了两次。"))
        if one.prompt is not None and other.prompt is not None:
            raise error(
                Bilingual(
                    f"Only one prompt can be active at a time, not {one.name}, {other.name}.",
                    f"同一时间只能激活一个提示类适配器，不能同时激活 {one.name} 和 {other.name}。",
                )
            )
        clash = next((path for a, b in permutations((one, other)) if (path := _replaced(a, b)) is not None), None)
        if clash is not None:
            raise error(
                Bilingual(
                    f"Adapters {one.name!r} and {other.name!r} cannot be active together: each has a {clash} of its "
                    "own. Make one of them active at a time.",
                    f"适配器 {one.name!r} 和 {other.name!r} 不能同时激活：各自都有自己的 {clash}。请一次激活一个。",
                )
            )


def _replaced(a: AttachedAdapter, b: AttachedAdapter) -> str | None:
    """What of `b` adapter `a` would replace; None for nothing."""
    alone = [
        path for path, layer in a.layers.items() if layer.EXCLUSIVE and not _of_one_kind(layer, b.layers.get(path))
    ]
    both = set(a.parts.parameters) & set(b.parts.parameters)
    for path in (*b.layers, *b.parts.parameters, *b.parts.modules):
        if path in both or inside(path, [*a.parts.modules, *alone]):
            return path
    for path, rows in b.parts.table_rows.items():
        own = a.parts.table_rows.get(path)
        if own is not None and (shared := set(own.indices) & set(rows.indices)):
            return f"row {min(shared)} of {path}"
    return None


def _of_one_kind(one: LayerAdapter, other: LayerAdapter | None) -> bool:
    """Whether two adapters on a layer are of a class of which several can be active."""
    return one.WITH_ITS_KIND and type(one) is type(other)


def check_rows(names: Sequence[str], *, merged: bool, alone: Collection[str]) -> None:
    """
    Args:
        names: The adapter of each row of a batch.
        merged: Adapters are merged into the weights.
        alone: The adapters that a batch cannot mix with others, such as biases and prompts.

    Raises:
        ConfigError: The rows cannot be computed so.
    """
    if merged:
        raise ConfigError(
            Bilingual(
                "adapter_names is of no use while adapters are merged: call unmerge_adapter first.",
                "适配器已合并时 adapter_names 不起作用：请先调用 unmerge_adapter。",
            )
        )
    if not names:
        raise ConfigError(
            Bilingual(
                "adapter_names is empty: name the adapter of each row, '__base__' for none.",
                "adapter_names 为空：请写出每条样本的适配器，不用适配器的写 '__base__'。",
            )
        )
    if len(set(names)) > 1 and alone:
        which = ", ".join(sorted(alone))
        raise ConfigError(
            Bilingual(
                f"adapter_names cannot mix {which} with other adapters in one batch: biases, prompts, aLoRA and "
                "adapters with a router need a batch of their own.",
                f"adapter_names 不能把 {which} 与其他适配器放在同一批里："
                "偏置、提示、aLoRA 和带路由的适配器须单独成批。",
            )
        )


def check_not_merged(name: str, merged: Collection[str]) -> None:
    """
    Args:
        merged: The adapters that are merged.

    Raises:
        ConfigError: `name` is one of them, and cannot be removed.
    """
    if name in merged:
        raise ConfigError(
            Bilingual(
                f"adapter {name!r} is merged into the weights: call unmerge_adapter before it is deleted.",
                f"适配器 {name!r} 已合并到权重中：请先调用 unmerge_adapter，再删除。",
            )
        )


def warn_of_no_merge() -> None:
    """For a merge of adapters that are all merged."""
    message = Bilingual("The adapters are merged already: nothing is done.", "这些适配器已经合并：不做任何事。")
    warnings.warn(message, stacklevel=4)
