"""The requirements of a task on its base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True)
class ModelSpec:
    """The requirements of a task on its base model.

    Attributes:
        task: The task's name, for errors.
        auto_class: The class of transformers that loads it.
        heads: Names of the modules of the task's head. It is new, so it is trained, saved with the adapter, and not
            quantized.
        outputs: Columns of the head, if it does not have one column per label.
        problem_type: What transformers calls the labels of its classes for sequences, for the model's config.
        needs_padding_token: The model reads the last token before the padding, so it must know the padding token.
        pooler: The model keeps the pooler of its class, if it has one. False where nothing reads its output.
    """

    task: str
    auto_class: str
    heads: tuple[str, ...] = ()
    outputs: int | None = None
    problem_type: ProblemType | None = None
    needs_padding_token: bool = False
    pooler: bool = True

    def columns(self, labels: Sequence[str] | None) -> int | None:
        """The number of columns of the head with these labels; None: that of the model's config."""
        return len(labels) if labels is not None else self.outputs
