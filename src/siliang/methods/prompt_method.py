"""What the methods with virtual tokens share: how they attach, and the hooks of the model's forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

from torch import nn

from siliang.language import Bilingual
from siliang.methods.method import Adapter, Method, Parts
from siliang.methods.prompt import PromptConfig
from siliang.methods.prompt_hooks import PromptHooks, PromptSpec, prompted_embeddings
from siliang.types import KindError

P = TypeVar("P", bound=PromptConfig)


class PromptMethod(Method[P]):
    """Virtual tokens; the base model's weights do not change.

    Attributes:
        hooks: How they reach the model.
    """

    hooks: ClassVar[type[PromptHooks]]
    why_not_mergeable = Bilingual(
        "A prompt is no change of the weights and cannot be merged into them: keep the adapter.",
        "提示不改变权重，无法合并到权重中：请保留适配器。",
    )

    def attach(self, model: nn.Module, config: P, *, saved: Sequence[str], from_file: bool) -> Parts:
        self.complete(model, config, from_file=from_file)
        tasks = config.tasks()
        return Parts(prompt=PromptSpec(config, self.hooks, tasks), rows=tasks)

    def complete(self, model: nn.Module, config: P, *, from_file: bool) -> None:
        """Fills in the shapes that the config leaves open.

        Raises:
            ConfigError: The model's config lacks them, or the adapter's differ; it has no config.
        """
        if not hasattr(model, "config"):
            raise KindError(
                Bilingual(
                    f"{type(model).__name__} has no config: prompts are for models of transformers.",
                    f"{type(model).__name__} 没有 config：提示类方法只用于 transformers 的模型。",
                )
            )
        config.complete(model.config, width=prompted_embeddings(model).weight.shape[1])

    def add_hooks(self, model: nn.Module, adapter: Adapter[P]) -> Callable[[], None]:
        assert adapter.prompt is not None
        return self.hooks(model, adapter.config, adapter.prompt).remove
