"""Architectures that are here and not in transformers: each a package that is imported when a model of its type is met,
and makes transformers' Auto classes know it."""

from __future__ import annotations

CHATGLM = "chatglm"
CHATGLM_TOKENIZER = "ChatGLMTokenizer"
EXTRA = (CHATGLM,)  # by their model_type


def make_known(model_type: object = None, *, tokenizer: object = None) -> None:
    """Imports the package of a model type, or a tokenizer's class, that is siliang's own; of any other nothing."""
    if model_type == CHATGLM or tokenizer == CHATGLM_TOKENIZER:
        import siliang.models.chatglm3  # noqa: F401
