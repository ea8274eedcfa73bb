"""The head of a task in fp32 beside a model in half precision, where nothing is learned.

bf16 has 8 bits: a head that computes in it gives a number near 3 in steps of 0.016, and many texts the same score. The
head is small, and its weights are in fp32 under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siliang.engine.patches import has_own_forward, patched


@contextmanager
def heads_in_fp32(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Within the block, which is without gradients, the linear layers of a task's head compute in fp32, where their
    weights are in fp32.

    Args:
        names: Of the head's modules.
    """
    with patched(list(_wide_forwards(model, names))):
        yield


def _wide_forwards(model: nn.Module, names: Collection[str]) -> Iterator[tuple[nn.Module, Callable[..., object]]]:
    for path, module in model.named_modules():
        if set(names).isdisjoint(path.split(".")) or type(module) is not nn.Linear or has_own_forward(module):
            continue
        if module.weight.dtype == torch.float32:
            yield module, partial(_linear, module)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer's product (..., D) -> (..., labels) in fp32, also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), layer.weight, layer.bias)
