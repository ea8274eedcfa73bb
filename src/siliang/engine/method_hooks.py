"""What methods add to training besides the forward pass: a loss term, and a hook after each step.

The training loop calls both functions for every model. For methods without them, such as plain LoRA, they do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from siliang.methods import method_of
from siliang.methods.method import Adapter, Method
from siliang.peft_api.model import PeftModel


def extra_loss(model: nn.Module) -> Tensor | None:
    """The sum of the loss terms of the trained adapters' methods, with their gradients; None if there are none.

    It is called once per optimizer step, after the gradients of the mean loss have been reduced over ranks: a separate
    backward pass adds its gradient, which is the same on every rank.

    Args:
        model: The trained model, which may be wrapped by DistributedDataParallel or torch.compile.

    Returns:
        (), in fp32.
    """
    found = [method.extra_loss(adapter) for method, adapter in _trained(model)]
    terms = [term for term in found if term is not None]
    return sum(terms[1:], terms[0]) if terms else None


def after_step(model: nn.Module, step: int) -> None:
    """Calls the after-step hooks of the trained adapters' methods, such as AdaLoRA's rank allocation.

    It is called after the optimizer's step, and before the gradients are set to zero: some methods read them. It is not
    called for a step that was skipped because of non-finite gradients.

    Args:
        model: As for `extra_loss`.
        step: The number of completed optimizer steps, this one included; a resumed run continues to count.
    """
    for method, adapter in _trained(model):
        method.after_step(adapter, step)


def _trained(model: nn.Module) -> Iterator[tuple[Method[Any], Adapter[Any]]]:
    """The active, trained adapters, each with its method."""
    while not isinstance(model, PeftModel):
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if not isinstance(inner, nn.Module):
            return
        model = inner
    for name in model.injection.active:
        if not model.peft_config[name].inference_mode:
            yield method_of(model.peft_config[name]), model.injection.adapters[name]
