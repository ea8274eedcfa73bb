"""What the methods with virtual tokens share: how they attach, and how the tokens stand in the model's forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

from torch import nn

from siliang.methods.method import Adapter, Method, Parts
from siliang.methods.prompt import PromptConfig
from siliang.methods.route import PromptSpec, Route, prompted_embeddings

P = TypeVar("P", bound=PromptConfig)


class PromptMethod(Method[P]):
    """Virtual tokens beside the base model, whose weights stay as they are.

    Attributes:
        route: How they reach the model.
    """

    route: ClassVar[type[Route]]
    why_not_mergeable = "A prompt stands beside the weights and cannot be merged into them: keep the adapter."

    def attach(self, model: nn.Module, config: P, *, saved: Sequence[str], from_file: bool) -> Parts:
        self.complete(model, config, from_file=from_file)
        return Parts(prompt=PromptSpec(config, self.route))

    def complete(self, model: nn.Module, config: P, *, from_file: bool) -> None:
        """Fills in the shapes that the config leaves open.

        Raises:
            ConfigError: The model does not say them, or those of the config are others.
        """
        embeddings: Any = prompted_embeddings(model)
        config.complete(model.config, width=embeddings.weight.shape[1])

    def add_hooks(self, model: nn.Module, adapter: Adapter[P]) -> Callable[[], None]:
        assert adapter.prompt is not None
        return self.route(model, adapter.config, adapter.prompt).remove
