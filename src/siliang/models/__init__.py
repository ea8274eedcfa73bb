"""Base models and their tokenizers. Importing this makes transformers' Auto classes know ChatGLM3."""

from siliang.models.chatglm3 import register

register()
