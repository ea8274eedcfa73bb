"""Gradient checkpointing of a model: its layers are recomputed in the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from siliang.language import Bilingual
from siliang.types import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def supports_checkpointing(model: nn.Module) -> bool:
    """Whether transformers lets the model's layers recompute their activations."""
    return getattr(model, "supports_gradient_checkpointing", True)


def enable_checkpointing(model: PreTrainedModel, **settings: object) -> None:
    """Turns gradient checkpointing on, with the method name of the installed transformers (5.23 renamed it).

    Args:
        settings: For torch.utils.checkpoint; `use_reentrant` is False unless given.

    Raises:
        ConfigError: The model does not support it.
    """
    if not supports_checkpointing(model):
        name = type(model).__name__
        raise ConfigError(
            Bilingual(
                f"{name} does not support gradient checkpointing: leave train.gradient_checkpointing out.",
                f"{name} 不支持梯度检查点：请去掉 train.gradient_checkpointing。",
            )
        )
    settings = {"use_reentrant": False} | settings
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
