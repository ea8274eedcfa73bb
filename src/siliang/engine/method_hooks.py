"""What the methods on a model do in training beside their forward: a term of the loss, and a hook after each step.

The training loop calls both functions for every model. Where no method has either, as with plain LoRA, they do nothing
and change no bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from siliang.methods import method_of
from siliang.methods.method import Adapter, Method
from siliang.peft_api.model import PeftModel


def extra_loss(model: nn.Module) -> Tensor | None:
    """The terms that the trained adapters' methods add to the loss, summed, with their gradients; None for none.

    Called once an optimizer step, when the gradient of the step's mean loss is there and ranks have exchanged theirs: a
    backward pass of its own adds its gradient, which is the same on every rank.

    Args:
        model: As it is trained, also within DistributedDataParallel or torch.compile.

    Returns:
        (), in fp32.
    """
    found = [method.extra_loss(adapter) for method, adapter in _trained(model)]
    terms = [term for term in found if term is not None]
    return sum(terms[1:], terms[0]) if terms else None


def after_step(model: nn.Module, step: int) -> None:
    """Lets the trained adapters' methods do what follows a step, such as giving their ranks to other layers.

    Called after the optimizer has stepped, and before the gradients are set to zero: some methods read them. A step
    that was skipped, for its gradients were not finite, is none.

    Args:
        model: As for `extra_loss`.
        step: Optimizer steps that are done, this one included; it continues over a resume.
    """
    for method, adapter in _trained(model):
        method.after_step(adapter, step)


def _trained(model: nn.Module) -> Iterator[tuple[Method[Any], Adapter[Any]]]:
    """The active adapters that are trained, each with its method."""
    while not isinstance(model, PeftModel):
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if not isinstance(inner, nn.Module):
            return
        model = inner
    for name in model.injection.active:
        if not model.peft_config[name].inference_mode:
            yield method_of(model.peft_config[name]), model.injection.adapters[name]
