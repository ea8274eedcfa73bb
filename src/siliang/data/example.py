"""What a row means: what every kind of example has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

IGNORED = -100  # the label of a token that is not learned


@dataclass(frozen=True)
class PromptAndTarget:
    """What a model that writes can be asked in one line, and the right answer.

    Attributes:
        input: What the instruction is about; often empty.
        plain: The instruction is the beginning of a text, which is continued.
    """

    instruction: str
    input: str
    target: str
    plain: bool = False


@dataclass(frozen=True)
class Example(ABC):
    """What a row means. Each kind is a frozen dataclass of what the row holds, and a row of `KINDS`.

    Attributes:
        task: The number of its task, for methods that train several at once; None where the data does not say.
    """

    task: int | None = field(default=None, kw_only=True)

    @property
    @abstractmethod
    def texts(self) -> list[str]:
        """Every text in it."""

    @property
    @abstractmethod
    def input_text(self) -> str:
        """What is given, without what is to be learned; two examples that ask the same have the same text here."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of classes in it, each as often as it occurs; none for a kind without classes."""
        return ()

    def with_classes(self, names: tuple[str, ...]) -> Example:
        """The same with other names in the place of `classes`."""
        return self

    @property
    def problem(self) -> str | None:
        """What is wrong with it although the row can be read; None if nothing is."""
        return None

    def prompt(self, beginning: int) -> PromptAndTarget | None:
        """What a model can be asked with it; None where one line does not show it.

        Args:
            beginning: Characters of a text without a question, which is then continued.
        """
        return None

    def values(self) -> dict[str, object]:
        """Its fields for JSON, without the task."""
        own = dict(vars(self))  # dataclasses.asdict copies deeply, which takes longer than all the rest
        del own["task"]
        return own

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Example:
        """The example whose `values` these are, after JSON."""
        own: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**own)
