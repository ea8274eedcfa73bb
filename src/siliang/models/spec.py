"""What a task asks of its base model, as models/ takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSpec:
    """The model that a task is learned with.

    Attributes:
        task: The task's name, for errors.
        auto_class: The class of transformers that loads it.
        heads: Names of modules that are the task's head. It is new, so it is trained, saved with the adapter, and not
            quantized.
        outputs: Columns of the head, where it has no column for each label.
        needs_padding_token: The model looks for the last token in front of the padding, so it has to know that token.
    """

    task: str
    auto_class: str
    heads: tuple[str, ...] = ()
    outputs: int | None = None
    needs_padding_token: bool = False

    def columns(self, labels: Sequence[str] | None) -> int | None:
        """Columns of the head with these labels; None: those of the model's own config."""
        return len(labels) if labels is not None else self.outputs
