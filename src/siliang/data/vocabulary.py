"""New tokens: the tokenizer learns them, the embeddings grow by them, and their rows are trained and saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from siliang.language import Bilingual
from siliang.models.tokenizer import Tokenizer
from siliang.types import ConfigError

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedModel


def grow_vocabulary(tokenizer: Tokenizer, tokens: Sequence[str]) -> int:
    """Adds the tokens that are not there yet; returns how many were new.

    Raises:
        ConfigError: One is empty, or given twice.
    """
    for token in tokens:
        if not token.strip():
            raise ConfigError(
                Bilingual(
                    f"data.add_tokens holds {token!r}, which is not a token.",
                    f"data.add_tokens 中的 {token!r} 不是词元。",
                )
            )
    if len(set(tokens)) != len(tokens):
        twice = next(t for t in tokens if list(tokens).count(t) > 1)
        raise ConfigError(
            Bilingual(f"data.add_tokens holds {twice!r} twice.", f"data.add_tokens 中 {twice!r} 出现了两次。")
        )
    return int(tokenizer.add_tokens(list(tokens))) if tokens else 0


def token_ids(tokenizer: Tokenizer, tokens: Sequence[str]) -> list[int]:
    """The numbers of tokens that the vocabulary has, each once."""
    found = (tokenizer.convert_tokens_to_ids(token) for token in tokens)
    return list(dict.fromkeys(i for i in found if i is not None))


def fit_embeddings(model: PreTrainedModel, tokenizer: Tokenizer, *, mean: bool = True) -> list[str]:
    """Makes the embeddings as large as the vocabulary, never smaller.

    New rows start at the mean of the old ones, as transformers does it. They must be trained and saved, or the new
    tokens stay what they were at the start.

    Args:
        mean: Off for a model without values.

    Returns:
        The names of the modules that grew; empty where there was room already.
    """
    rows = model.get_input_embeddings().weight
    assert isinstance(rows, Tensor)
    if len(rows) >= len(tokenizer):
        return []
    model.resize_token_embeddings(len(tokenizer), mean_resizing=mean)
    return embedding_modules(model)


def embedding_modules(model: Any) -> list[str]:
    """The names of the modules with a row for each token: the embedding, and the output head where there is one."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [name for name, module in model.named_modules() if any(module is end for end in ends if end is not None)]
