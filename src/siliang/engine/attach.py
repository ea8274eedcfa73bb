"""A run's method on its base model: as the run itself attaches it, and its plan."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from siliang.config import RunConfig
from siliang.data.vocabulary import embedding_modules
from siliang.hardware import Choice
from siliang.methods import Method
from siliang.models.quantized import count_parameters
from siliang.peft_api.model import PeftModel, get_peft_model
from siliang.tasks import TASKS


def attach(
    model: nn.Module, method: Method, config: RunConfig, precision: Choice, *, start: Path | None = None
) -> tuple[nn.Module, int, int]:
    """The model with the run's method on it; how many parameters it trains, and of how many.

    Args:
        start: The adapter folder whose weights are the start; None for new ones.
    """
    if start is not None:
        model = PeftModel.from_pretrained(model, start, is_trainable=True)
    elif method.config is None:
        for p in model.parameters():
            p.requires_grad_(True)
    else:
        # a copy: attaching completes the config, and the resolved run.yaml keeps what the user gave
        arguments = dict(config.method.arguments)
        if config.data.add_tokens:  # new tokens are learned only where their embeddings are
            named = [*(arguments.get("modules_to_save") or []), *embedding_modules(model)]
            arguments["modules_to_save"] = list(dict.fromkeys(named))
        model = get_peft_model(model, method.config(task_type=TASKS[config.task].adapter_type, **arguments))
    if precision.pure:
        for p in model.parameters():
            p.data = p.data.to(precision.dtype) if p.requires_grad else p.data
    return model, *count_parameters(model)
