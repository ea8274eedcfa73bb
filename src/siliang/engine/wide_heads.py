"""The head of a task in fp32 beside a model in half precision, where nothing is learned.

bf16 has 8 bits: a head that computes in it gives a number near 3 in steps of 0.016, and many texts the same score. The
head is small, and its weights are in fp32: those of an adapter's own copy beside a base in half precision, and those of
a model that is tuned whole under autocast. A head in half precision (pure-bf16), or with adapters on its layers, stays
as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from siliang.adapters.modules_to_save import ModulesToSaveWrapper
from siliang.engine.patches import has_own_forward, patched
from siliang.types import OTHER_HEADS


@contextmanager
def heads_in_fp32(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Within the block, which is without gradients, a task's head computes in fp32, where its weights are in fp32.

    Args:
        names: Of the head's modules, by the task.
    """
    with patched(list(_wide_forwards(model, {*names, *OTHER_HEADS})) if names else []):
        yield


def _wide_forwards(model: nn.Module, names: set[str]) -> Iterator[tuple[nn.Module, Callable[..., object]]]:
    for path, module in model.named_modules():
        if path.rpartition(".")[2] not in names or has_own_forward(module):
            continue
        if isinstance(module, ModulesToSaveWrapper):
            own = module.module_of(module.active)
            if own is not module.original_module and module.rows is None and _is_wide(own):
                yield module, partial(_wide, own)
        elif _is_wide(module):
            yield module, partial(_wide, module, forward=module.forward)


def _is_wide(module: nn.Module) -> bool:
    """All weights are in fp32, and there are some."""
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
    return dtypes == {torch.float32}


def _wide(module: nn.Module, *args: object, forward: Callable[..., object] | None = None, **kwargs: object) -> object:
    """The module's result in fp32, of inputs in any format, also under autocast.

    Args:
        forward: The module's own, where it is replaced.
    """
    args, kwargs = tree_map(_wide_tensor, (args, kwargs))
    device = next(module.parameters()).device.type
    with torch.autocast(device, enabled=False):
        return (forward or module)(*args, **kwargs)


def _wide_tensor(value: object) -> object:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
