"""siliang (四两): parameter-efficient fine-tuning of transformers on the machine you have.

The names, defaults and adapter files are those of Hugging Face PEFT. Everything is imported on first use, so that
`import siliang` is fast. The names are those that `__init__.pyi` imports.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "__all__":
        return sorted(_homes())
    if name not in _homes():
        raise AttributeError(f"module 'siliang' has no attribute {name!r}")
    return getattr(importlib.import_module(_homes()[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_homes()})


@cache
def _homes() -> dict[str, str]:
    """The module of each public name."""
    import ast

    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}
