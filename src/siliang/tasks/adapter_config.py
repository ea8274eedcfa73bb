"""The config of a run's adapter: what the settings say of the method, for the task and for new tokens."""

from __future__ import annotations

from torch import nn

from siliang.config import RunConfig
from siliang.data.vocabulary import embedding_modules
from siliang.methods import find_method
from siliang.methods.config import PeftConfig
from siliang.tasks import TASKS


def adapter_config(config: RunConfig, model: nn.Module) -> PeftConfig:
    """A new config, which attaching completes; the settings keep what the user gave.

    Args:
        config: Of a run whose method is not full fine-tuning.
        model: Its base model, with or without weights.

    Raises:
        ConfigError: The method has no such settings.
    """
    method = find_method(config.method.name)
    assert method.config is not None
    arguments = dict(config.method.arguments)
    if config.data.add_tokens:  # new tokens are learned only where their embeddings are
        named = [*(arguments.get("modules_to_save") or []), *embedding_modules(model)]
        arguments["modules_to_save"] = list(dict.fromkeys(named))
    return method.config(task_type=TASKS[config.task].adapter_type, **arguments)
