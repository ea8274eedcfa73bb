"""Virtual tokens: the config that the methods with prompts share, and what makes the tokens."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from siliang.language import Bilingual
from siliang.methods.config import PeftConfig
from siliang.methods.task_ids import TaskIds
from siliang.types import ConfigError, TaskType

PROMPT_KEY = "prompt_embeddings"  # of the table of virtual tokens in the file
# The names that models' configs have for them, in the order in which PEFT looks.
SHAPES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}


@dataclass(kw_only=True)
class PromptConfig(PeftConfig):
    """A method that puts trained virtual tokens before the text and leaves the base model's layers alone.

    What is None is read from the base model when attaching.

    Attributes:
        num_virtual_tokens: Length of the prompt.
        token_dim: Width of a virtual token: the model's hidden size, or, for a prefix, all key/value heads together.
        num_transformer_submodules: 2 for encoder-decoders, whose files have twice the rows, otherwise 1.
        num_attention_heads: Heads; for a prefix the key/value heads.
        num_layers: Blocks of the model.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None

    is_prompt_learning: ClassVar[bool] = True
    NEEDED: ClassVar[tuple[str, ...]] = ("token_dim",)
    AT_LEAST_1: ClassVar[tuple[str, ...]] = (
        "num_virtual_tokens",
        "token_dim",
        "num_transformer_submodules",
        "num_attention_heads",
        "num_layers",
    )

    def complete(self, model_config: object, *, width: int | None = None) -> None:
        """Fills in the shapes from the base model.

        Args:
            model_config: The base model's config.
            width: Of its word embeddings, to which the virtual tokens are added.

        Raises:
            ConfigError: The model's config lacks them, or the given ones differ.
        """
        if self.num_virtual_tokens is None:
            raise ConfigError(
                Bilingual(
                    f"{type(self).__name__} needs num_virtual_tokens (in a run: method.num_virtual_tokens), "
                    "such as 20.",
                    f"{type(self).__name__} 需要 num_virtual_tokens（在运行中是 method.num_virtual_tokens），例如 20。",
                )
            )
        if self.num_transformer_submodules is None:
            self.num_transformer_submodules = 2 if self.task_type is TaskType.SEQ_2_SEQ_LM else 1
        if self.token_dim is None:
            self.token_dim = width
        if width is not None and self.token_dim != width:
            raise ConfigError(
                Bilingual(
                    f"token_dim = {self.token_dim}: the model's word embeddings have {width} columns.",
                    f"token_dim = {self.token_dim}：模型的词嵌入有 {width} 列。",
                )
            )
        for name, names in SHAPES.items():
            if getattr(self, name) is None:
                setattr(self, name, config_number(model_config, names))
        for name in self.NEEDED:
            if getattr(self, name) is None:
                raise ConfigError(
                    Bilingual(
                        f"{type(model_config).__name__} has no {name}: set it in {type(self).__name__}.",
                        f"{type(model_config).__name__} 没有 {name}：请在 {type(self).__name__} 中设置。",
                    )
                )

    @property
    def rows(self) -> int:
        """Rows of the saved table of virtual tokens."""
        assert self.num_virtual_tokens is not None
        return self.num_virtual_tokens * (self.num_transformer_submodules or 1)

    @property
    def width(self) -> int:
        """Columns of the saved table of virtual tokens, once the config is complete."""
        assert self.token_dim is not None
        return self.token_dim

    @property
    def file_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what the file holds, by its key there, once the config is complete."""
        return {PROMPT_KEY: (self.rows, self.width)}

    @property
    def encoder_elements(self) -> int:
        """Parameters that make the table while it is trained: the table's own where nothing else makes it."""
        return self.rows * self.width

    def make_prompt(self, word_embeddings: nn.Embedding) -> Prompt:
        """A new prompt.

        Args:
            word_embeddings: The base model's, to which the virtual tokens are added.
        """
        raise NotImplementedError

    def tasks(self) -> TaskIds | None:
        """The task of each row, for a prompt that each task has its own of."""
        return None

    def for_file(self, *, has_encoder: bool) -> Self:
        """The settings to make a prompt with that a file will fill.

        Args:
            has_encoder: The files hold what made the prompt, and not the prompt alone.
        """
        return self if has_encoder else dataclasses.replace(self, inference_mode=True)


def config_number(model_config: object, names: Sequence[str]) -> int | None:
    """The first of `names` that the config of the text model has a number for; None where it has none."""
    text = model_config.get_text_config() if isinstance(model_config, PretrainedConfig) else model_config
    for name in names:
        try:
            if isinstance(value := getattr(text, name, None), int):
                return value
        except Exception:  # a config whose layers differ in it raises an error of its own class
            continue
    return None


class Prompt(nn.Module, ABC):
    """What makes the virtual tokens. A saved file holds the table that it makes, and not its encoder.

    Attributes:
        flat: The embedding is the prompt itself: it has no encoder, or was loaded from a file.
        tasks: The task of each row, where each task has a prompt of its own; the adapter's parts have it.
    """

    embedding: nn.Embedding
    flat: bool
    tasks: TaskIds | None = None

    @abstractmethod
    def forward(self) -> Tensor:
        """The table of virtual tokens, (rows, width): what `prompt_embeddings` holds in the file."""

    def of_rows(self, batch: int) -> Tensor:
        """The virtual tokens of each row of a batch, (batch, rows, width)."""
        return self().expand(batch, -1, -1)

    def trained(self) -> list[nn.Parameter]:
        """What of it is trained."""
        return list(self.parameters())

    def extra_tensors(self) -> dict[str, nn.Parameter]:
        """The other tensors of the file, by their keys there."""
        return {}

    @torch.no_grad()
    def flatten(self, table: Tensor) -> None:
        """Becomes the plain table of a file. A prompt that is plain already keeps its parameter, because an optimizer
        may have it."""
        weight = self.embedding.weight
        if self.flat and weight.shape == table.shape:
            weight.copy_(table)
            return
        for name, _ in list(self.named_children()):
            if name != "embedding":
                delattr(self, name)
        rows, width = table.shape
        self.embedding = nn.Embedding(rows, width, _weight=table.to(device=weight.device, dtype=weight.dtype))
        self.flat = True
