"""Attaches a run's method to its base model, for the run itself and for its plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from siliang.config import RunConfig
from siliang.hardware import Choice
from siliang.methods import Method
from siliang.methods.config import PeftConfig
from siliang.models.quantized import count_parameters
from siliang.peft_api.for_tasks import get_peft_model
from siliang.peft_api.model import PeftModel
from siliang.tasks.adapter_config import adapter_config

# Learns an adapter's initialization on a base model: from its config, and that of one that is on the same layers and
# changes nothing. Returns the config with which it is attached.
Learn = Callable[[PreTrainedModel, PeftConfig, PeftConfig], PeftConfig]


def attach(
    base: PreTrainedModel,
    method: Method,
    config: RunConfig,
    precision: Choice,
    *,
    start: Path | None = None,
    new_tokens: Sequence[int] | None = None,
    steps: int | None = None,
    learn: Learn | None = None,
) -> tuple[PreTrainedModel | PeftModel, int, int]:
    """The model with the run's method attached, its trained parameters, and all of its parameters.

    Args:
        start: The adapter folder with the initial weights; None for new weights.
        new_tokens: See `adapter_config`.
        steps: Optimizer steps of the run; None if the model is not trained.
        learn: Learns the initialization of the adapter from data, if its method has such a one.
    """
    model: PreTrainedModel | PeftModel = base
    if start is not None:
        model = PeftModel.from_pretrained(base, start, is_trainable=True)
    elif method.config is None:
        for p in model.parameters():
            p.requires_grad_(True)
    else:
        own = adapter_config(config, base, new_tokens)
        own = own if steps is None else method.prepare(own, steps)
        if learn is not None and (plain := method.uninitialized(own)) is not None:
            own = learn(base, own, plain)
        model = get_peft_model(base, own)
    if precision.pure:
        for p in model.parameters():
            p.data = p.data.to(precision.dtype) if p.requires_grad else p.data
    return model, *count_parameters(model)
