"""ChatGLM3 (6B, base, 32k), which transformers lacks: the architecture, and its tokenizer. Importing this makes
transformers' Auto classes know it; `load.py` does so where it meets one."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from siliang.models.chatglm3.config import ChatGLMConfig
from siliang.models.chatglm3.model import (
    ChatGLMForConditionalGeneration,
    ChatGLMForSequenceClassification,
    ChatGLMModel,
)
from siliang.models.chatglm3.tokenizer import ChatGLMTokenizer

__all__ = [
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "ChatGLMForSequenceClassification",
    "ChatGLMModel",
    "ChatGLMTokenizer",
    "register",
]


def register() -> None:
    """Tells the Auto classes that model type "chatglm" is opened here; calling it again changes nothing.

    Published folders name code of their own (`auto_map`). These classes take its place, so that nothing of the folder
    is run; only AutoTokenizer still runs it with trust_remote_code=True, as do the others before
    transformers 5.5. The class names are those that the folders name, because transformers finds a tokenizer by the
    name of its class.
    """
    AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
    AutoModel.register(ChatGLMConfig, ChatGLMModel, exist_ok=True)
    AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
    AutoModelForSequenceClassification.register(ChatGLMConfig, ChatGLMForSequenceClassification, exist_ok=True)
    AutoTokenizer.register(ChatGLMConfig, ChatGLMTokenizer, exist_ok=True)


register()
