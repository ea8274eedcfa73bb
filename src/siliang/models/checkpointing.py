"""Gradient checkpointing of a model: its layers are recomputed in the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def enable_checkpointing(model: PreTrainedModel, **settings: object) -> None:
    """Turns gradient checkpointing on, with the method name of the installed transformers (5.23 renamed it).

    Args:
        settings: For torch.utils.checkpoint; `use_reentrant` is False unless given.
    """
    settings = {"use_reentrant": False} | settings
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
