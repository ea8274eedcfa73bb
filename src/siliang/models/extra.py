"""Architectures that transformers does not have: each is a package that is imported when a model of its type is loaded,
and registers itself with transformers' Auto classes."""

from __future__ import annotations

CHATGLM = "chatglm"
CHATGLM_TOKENIZER = "ChatGLMTokenizer"
EXTRA = (CHATGLM,)  # by their model_type


def make_known(model_type: object = None, *, tokenizer: object = None) -> None:
    """Imports siliang's package for a model type or a tokenizer class, if it has one."""
    if model_type == CHATGLM or tokenizer == CHATGLM_TOKENIZER:
        import siliang.models.chatglm3  # noqa: F401
