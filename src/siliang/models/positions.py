"""The length limit of models with a table of positions: positions beyond the table do not exist.

Models with rotary or relative positions have no table, and no such limit. Some rotate all tokens of a text in
another way once it is longer than those of the pretraining.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from siliang.language import Bilingual
from siliang.models.introspect import decoder, encoder, is_encoder_decoder

# rotations whose factor is not in max_position_embeddings; Llama 3's and Phi-3's is, and that of Gemma 3, by layer
STRETCHED = ("linear", "dynamic", "yarn")
BY_LENGTH = ("dynamic", "longrope")  # rotations that depend on the length of the text
TABLES = ("position_embeddings", "embed_positions", "wpe", "position_embedding", "positions_embed", "pos_encoding")


@dataclass(frozen=True)
class Positions:
    """The number of tokens that a model can read and write, without virtual tokens.

    Attributes:
        reads: Tokens of a row; for an encoder-decoder, of its source. None: no limit.
        writes: Tokens of a target, for an encoder-decoder. None: no limit.
        virtual: Virtual tokens of the method.
    """

    reads: int | None
    writes: int | None
    virtual: int = 0

    @classmethod
    def of(cls, model: nn.Module, *, virtual: int = 0, prefix: bool = False) -> Positions:
        """The limits of a base model, with or without its weights.

        Args:
            virtual: Virtual tokens before each row, which need positions, too.
            prefix: The virtual tokens are a prefix: an encoder-decoder has them before its target.
        """
        if not is_encoder_decoder(model):
            return cls(_less(table_of_positions(model), virtual), None, virtual)
        reads, writes = table_of_positions(encoder(model)), table_of_positions(decoder(model))
        return cls(_less(reads, 0 if prefix else virtual), _less(writes, virtual if prefix else 0), virtual)

    def in_words(self, limit: int) -> Bilingual:
        """The limit as text, with the virtual tokens that it excludes."""
        if not self.virtual:
            return Bilingual(f"{limit:,} positions", f"{limit:,} 个位置")
        table = limit + self.virtual
        return Bilingual(
            f"{limit:,} positions ({table:,}, of which the method's virtual tokens take {self.virtual})",
            f"{limit:,} 个位置（共 {table:,} 个，其中 {self.virtual} 个被虚拟词元占用）",
        )


def table_of_positions(model: nn.Module) -> int | None:
    """The rows of a model's table of positions that tokens can use; None without a table."""
    found: list[int] = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TABLES and isinstance(module, nn.Embedding):
            # OPT and BART reserve the first two rows, RoBERTa those up to the padding id
            front = getattr(module, "offset", None)
            if not isinstance(front, int):
                front = 0 if module.padding_idx is None else module.padding_idx + 1
            found.append(module.weight.shape[0] - front)
        for table in TABLES:
            values = vars(module).get(table, module._buffers.get(table))
            if isinstance(values, Tensor) and values.dim() == 2:  # the tables of GPT-J and CTRL, which are not trained
                found.append(values.shape[0])
    return min(found, default=None)


def trained_length(model: nn.Module | PreTrainedConfig) -> int | None:
    """The tokens of the longest text that a model was made for, by its config, its rotations' scaling included; one
    without a table of positions reads longer ones, and worse. None where the config does not say."""
    config: Any = model if isinstance(model, PreTrainedConfig) else getattr(model, "config", None)
    if config is None:
        return None
    config = config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or length <= 0:
        return None
    kinds = _rotations(config)
    factor = kinds[0].get("factor") if len(kinds) == 1 and kinds[0].get("rope_type") in STRETCHED else None
    if not isinstance(factor, int | float):
        return length
    return max(length, int((kinds[0].get("original_max_position_embeddings") or length) * factor))


def _rotations(config: Any) -> list[Mapping[str, Any]]:
    """The settings of the rotations: of all layers, or by their kind."""
    found: Any = getattr(config, "rope_parameters", None) or {}
    kinds = [found] if "rope_type" in found else list(found.values())
    return [kind for kind in kinds if isinstance(kind, Mapping)]


def longest_alike(config: PreTrainedConfig) -> int | None:
    """The longest text, in tokens, whose tokens are rotated as those of any shorter one; None for any length."""
    own: Any = getattr(config, "original_max_position_embeddings", None)  # where Phi-3 also drops its cache
    limits = [
        kind.get("original_max_position_embeddings") or own or getattr(config, "max_position_embeddings", None)
        for kind in _rotations(config)
        if kind.get("rope_type") in BY_LENGTH
    ]
    return min((limit for limit in (own, *limits) if isinstance(limit, int)), default=None)


def _less(limit: int | None, taken: int) -> int | None:
    return None if limit is None else limit - taken
