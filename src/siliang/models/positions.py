"""How many tokens a model has positions for, where it has a table of them: beyond its end there is nothing to look up.

Models with rotary or relative positions have no table, and no such end.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.models.introspect import decoder, encoder, is_encoder_decoder

TABLES = ("position_embeddings", "embed_positions", "wpe", "position_embedding", "positions_embed", "pos_encoding")


@dataclass(frozen=True)
class Positions:
    """What a model can read and write, virtual tokens taken off.

    Attributes:
        reads: Tokens of a row; of an encoder-decoder model, of its source. None: there is no end.
        writes: Tokens of a target, for an encoder-decoder model. None: there is no end.
        virtual: Tokens that the method puts in front.
    """

    reads: int | None
    writes: int | None
    virtual: int = 0

    @classmethod
    def of(cls, model: nn.Module, *, virtual: int = 0, prefix: bool = False) -> Positions:
        """Of a base model, with or without its weights.

        Args:
            virtual: Virtual tokens in front of each row, which take positions too.
            prefix: They are a prefix: an encoder-decoder model has them in front of its target.
        """
        if not is_encoder_decoder(model):
            return cls(_less(table_of_positions(model), virtual), None, virtual)
        reads, writes = table_of_positions(encoder(model)), table_of_positions(decoder(model))
        return cls(_less(reads, 0 if prefix else virtual), _less(writes, virtual if prefix else 0), virtual)

    def in_words(self, limit: int) -> Bilingual:
        """The limit, and what it leaves out."""
        if not self.virtual:
            return Bilingual(f"{limit:,} positions", f"{limit:,} 个位置")
        table = limit + self.virtual
        return Bilingual(
            f"{limit:,} positions ({table:,}, of which the method's virtual tokens take {self.virtual})",
            f"{limit:,} 个位置（共 {table:,} 个，其中 {self.virtual} 个被虚拟词元占用）",
        )


def table_of_positions(model: nn.Module) -> int | None:
    """The rows of a model's table of positions that tokens can have; None where it has none."""
    found: list[int] = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TABLES and isinstance(module, nn.Embedding):
            # OPT and BART keep two rows in front, RoBERTa those up to the padding's number
            front = getattr(module, "offset", None)
            if not isinstance(front, int):
                front = 0 if module.padding_idx is None else module.padding_idx + 1
            found.append(module.weight.shape[0] - front)
        for table in TABLES:
            values = vars(module).get(table, module._buffers.get(table))
            if isinstance(values, Tensor) and values.dim() == 2:  # GPT-J's and CTRL's, which nothing trains
                found.append(values.shape[0])
    return min(found, default=None)


def _less(limit: int | None, taken: int) -> int | None:
    return None if limit is None else limit - taken
