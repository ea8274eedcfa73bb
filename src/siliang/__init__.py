"""siliang (四两): parameter-efficient fine-tuning of transformers on the machine you have.

The names, defaults and adapter files are those of Hugging Face PEFT. Everything is imported on first use, so that
`import siliang` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from siliang.methods.base import PeftConfig
    from siliang.methods.bitfit import BitFitConfig
    from siliang.methods.lora import LoraConfig
    from siliang.peft_model import PeftModel, get_peft_model
    from siliang.types import PeftType, SiliangError, TaskType

__version__ = "0.1.0"

_HOME = {
    "BitFitConfig": "siliang.methods.bitfit",
    "LoraConfig": "siliang.methods.lora",
    "PeftConfig": "siliang.methods.base",
    "PeftModel": "siliang.peft_model",
    "PeftType": "siliang.types",
    "SiliangError": "siliang.types",
    "TaskType": "siliang.types",
    "get_peft_model": "siliang.peft_model",
}

__all__ = [
    "BitFitConfig",
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "PeftType",
    "SiliangError",
    "TaskType",
    "get_peft_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'siliang' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
