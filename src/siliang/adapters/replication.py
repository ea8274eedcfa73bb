"""LoRA's `layer_replication`: a new stack of the base model's layers, several of which may share their weights.

    [[0, 4], [2, 5]]: the layers 0, 1, 2, 3, 2, 3, 4, each with an adapter of its own

A replica is a module of its own with the parameters of the layer that it is made of. Its number in the stack is its
place there, by which it finds its keys and values in the cache.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from siliang.adapters.tied_weights import replace_module
from siliang.language import Bilingual
from siliang.methods.config import PeftConfig
from siliang.models.introspect import NoLayerStackError, layer_stack
from siliang.module_paths import plain_modules
from siliang.types import ConfigError

NUMBERS = ("layer_idx", "layer_id")  # what attentions call the number of their layer
KINDS = ("layer_types", "mlp_layer_types")  # lists of a config, with an entry for each layer


class Replication:
    """Replicated layers in the place of a base model's own.

    Attributes:
        adapter: The adapter that they are for.
    """

    def __init__(self, model: Any, adapter: str, ranges: Sequence[Sequence[int]]) -> None:
        """
        Raises:
            ConfigError: The model does not have these layers, or its layers cannot be replicated.
        """
        self.adapter, self._model = adapter, model
        self._path, self._stack = _stack_of(model)
        if (most := max(end for _, end in ranges)) > len(self._stack):
            raise ConfigError(
                Bilingual(
                    f"layer_replication: {most} is past the last of the model's {len(self._stack)} layers.",
                    f"layer_replication：{most} 超出了模型的 {len(self._stack)} 层。",
                )
            )
        config = model.config.get_text_config()
        order = [i for start, end in ranges for i in range(start, end)]
        kinds = {key: kept for key in KINDS if isinstance(kept := getattr(config, key, None), list)}
        self._config, self._before = config, {"num_hidden_layers": config.num_hidden_layers, **kinds}
        shared = {id(each): each for each in (model.config, config)}
        layers = nn.ModuleList(_replica(self._stack[i], number, dict(shared)) for number, i in enumerate(order))
        replace_module(model, self._path, layers)
        config.num_hidden_layers = len(order)  # first: a config checks the lengths of its lists by it
        for key, kept in kinds.items():
            setattr(config, key, [kept[i] for i in order])

    def undo(self) -> None:
        """Gives the base model its own layers back."""
        replace_module(self._model, self._path, self._stack)
        for key, value in self._before.items():
            setattr(self._config, key, value)

    def make_permanent(self) -> None:
        """Gives each layer weights of its own, so that a saved model has all of them."""
        seen: set[int] = set()
        for layer in self._model.get_submodule(self._path):
            own = dict(layer.named_parameters())
            for path, p in own.items():
                if id(p) in seen:
                    owner, _, key = path.rpartition(".")
                    copied = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
                    setattr(layer.get_submodule(owner), key, copied)
            seen |= {id(p) for p in own.values()}


@contextmanager
def replicated(model: nn.Module, name: str, config: PeftConfig, others: Sequence[str]) -> Iterator[Replication | None]:
    """Within the block, and behind it unless the block fails, the bare base model has the layers of a new adapter.

    Args:
        others: The adapters that the model has already.

    Raises:
        ConfigError: There are others, or as `Replication`.
    """
    ranges = getattr(config, "layer_replication", None)
    if not ranges:
        yield None
        return
    if others:
        raise ConfigError(
            Bilingual(
                f"layer_replication changes the base model's layers, on which adapter {others[0]!r} is: use a model "
                "without adapters.",
                f"layer_replication 会改变基座模型的层，而适配器 {others[0]!r} 就在这些层上：请用没有适配器的模型。",
            )
        )
    found = Replication(model, name, ranges)
    try:
        yield found
    except BaseException:
        found.undo()
        raise


def _stack_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path of the model's stack of layers, and the stack.

    Raises:
        ConfigError: There is no such stack, or more than one.
    """
    try:
        layers = layer_stack(model)
    except NoLayerStackError:
        raise ConfigError(
            Bilingual(
                f"layer_replication is only for models with one stack of layers: {type(model).__name__} has none.",
                f"layer_replication 用于只有一组层的模型：{type(model).__name__} 不是。",
            )
        ) from None
    return next(
        (path, module)
        for path, module in plain_modules(model)
        if isinstance(module, nn.ModuleList) and list(module) == layers
    )


def _replica(layer: nn.Module, number: int, memo: dict[int, object]) -> nn.Module:
    """A copy of a layer that shares its parameters and its config, at another place of the stack."""
    memo |= {id(p): p for p in layer.parameters()}
    copied = copy.deepcopy(layer, memo)
    for module in copied.modules():
        for key in NUMBERS:
            if isinstance(getattr(module, key, None), int):
                setattr(module, key, number)
    return copied
