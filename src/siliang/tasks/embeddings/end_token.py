"""A tokenizer that puts the end-of-sequence token behind each text, where its own does not: the state of that token is
the vector of the text."""

from __future__ import annotations

import copy
from typing import Any

from tokenizers import processors

from siliang.models.tokenizer import Tokenizer


def with_end(tokenizer: Tokenizer) -> Any:
    """The tokenizer, or a copy of it that ends each text. One without an end of sequence, or whose rules are not those
    of the tokenizers library, is not changed: the last token is that of the text."""
    end, backend = tokenizer.eos_token_id, getattr(tokenizer, "backend_tokenizer", None)
    if end is None or tokenizer.eos_token is None or backend is None:
        return tokenizer
    if tokenizer("a", verbose=False)["input_ids"][-1:] == [end]:
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    name = tokenizer.eos_token
    ending = processors.TemplateProcessing(
        single=f"$A {name}:0", pair=f"$A {name}:0 $B:1 {name}:1", special_tokens=[(name, end)]
    )
    own = backend.post_processor
    inner = getattr(changed, "backend_tokenizer")  # noqa: B009  # not of the interface
    inner.post_processor = ending if own is None else processors.Sequence([own, ending])
    return changed if changed("a", verbose=False)["input_ids"][-1:] == [end] else tokenizer
