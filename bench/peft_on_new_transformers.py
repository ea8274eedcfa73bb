"""The peer and oracle, PEFT 0.21.2, on transformers 5.24 or later, which call `past_key_values` `cache`.

PEFT looks for the old name in what a model's `prepare_inputs_for_generation` returns and among the parameters of its
forward, and does not find it: its prefix is lost in `generate`, with no error, and it refuses classifiers with one.
In the bench and in the tests PEFT is shown the old name, and gives the new one back. Nothing else of it changes: its
arithmetic is its own. This file goes when a release of PEFT knows the new name; `needed` says so then.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft.peft_model
from transformers import LlamaForCausalLM

OLD, NEW = "past_key_values", "cache"


def needed() -> bool:
    """Whether transformers has the new name, and PEFT neither knows it nor is shown the old one already."""
    if vars(peft.peft_model)["inspect"] is not inspect:
        return False
    renamed = NEW in inspect.signature(LlamaForCausalLM.forward).parameters
    return renamed and f'"{NEW}"' not in inspect.getsource(peft.PeftModelForCausalLM.prepare_inputs_for_generation)


def show_old_name(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Makes PEFT see `past_key_values` where transformers has `cache`, if that is needed.

    Args:
        replace: Sets an attribute of a class or module: for good, unless it is given.
    """
    if not needed():
        return
    for kind in (peft.PeftModelForCausalLM, peft.PeftModelForSeq2SeqLM):
        replace(kind, "prepare_inputs_for_generation", _between(kind.prepare_inputs_for_generation))
    replace(peft.peft_model, "inspect", SimpleNamespace(**vars(inspect) | {"signature": _signature}))


def _between(theirs: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """PEFT's function, between a base model's that returns the new name and a `generate` that wants it."""

    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        of_base = self.base_model_prepare_inputs_for_generation
        self.base_model_prepare_inputs_for_generation = lambda *a, **k: _renamed(of_base(*a, **k), NEW, OLD)
        try:
            return _renamed(theirs(self, *args, **kwargs), OLD, NEW)
        finally:
            self.base_model_prepare_inputs_for_generation = of_base

    return prepare_inputs_for_generation


def _renamed(values: dict[str, Any], before: str, after: str) -> dict[str, Any]:
    return {after if name == before else name: value for name, value in values.items()}


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    found = inspect.signature(function)
    both = [p.replace(name=OLD) if p.name == NEW else p for p in found.parameters.values()]
    return found.replace(parameters=both)
