"""The data of a run, ready for training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from siliang.data.examples import Example, Span

if TYPE_CHECKING:  # slow to import
    from siliang.data.tokens import TokenSet


@dataclass(frozen=True)
class EvalRows:
    """Rows that a model is measured on.

    Attributes:
        tokens: Their entries; several of one example, or none.
        examples: The rows before tokens.
        labels: The names of classes or tags, by number.
        unanswered: A question may have no answer in its context.
    """

    tokens: TokenSet
    examples: Sequence[Example]
    labels: list[str] = field(default_factory=list[str])
    unanswered: bool = False


def has_unanswered(examples: Sequence[Example]) -> bool:
    """Whether some question has no answer in its context; False for rows that are no questions."""
    if not len(examples) or not isinstance(examples[0], Span):
        return False
    return any(isinstance(example, Span) and not example.answers for example in examples)
