"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models
(Ben Zaken et al., 2021, arXiv:2106.10199).

    every layer's y = f(W x + b): W stays, b is trained

Nothing is added: the trained bias stands in the old one's place, so the forward costs what the base model's does, and
the base's own bias is kept aside for `unload` and `disable_adapter`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from siliang.methods.base import PeftConfig
from siliang.types import PeftType


@dataclass(kw_only=True)
class BitFitConfig(PeftConfig):
    """BitFit has no settings of its own: every existing bias is trained, and nothing else."""

    peft_type: ClassVar[PeftType] = PeftType.BITFIT


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias, by its own name: `bias`, an LSTM's `bias_ih_l0`, attention's `in_proj_bias`.

    T5's `relative_attention_bias.weight` is an embedding table and is none.
    """
    own = name.rpartition(".")[2]
    return own == "bias" or own.startswith("bias_") or own.endswith("_bias")


def bias_names(model: nn.Module) -> list[str]:
    """The names of every bias in `model`, a shared one once."""
    return [name for name, _ in model.named_parameters() if is_bias(name)]
