"""Packages of siliang that are called like the function of the same name: `siliang.train(...)`.

Python sets `siliang.train` to the package when a module in it is imported, in the place of any function of that name.
So the package itself can be called.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any

FUNCTIONS = "siliang.functions"


class CallablePackage(ModuleType):
    """A package that calls the function of its name in functions.py."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    @property
    def _function(self) -> Any:
        return getattr(importlib.import_module(FUNCTIONS), self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)


def make_callable(name: str) -> None:
    """Makes the package or module of this name callable."""
    sys.modules[name].__class__ = CallablePackage
