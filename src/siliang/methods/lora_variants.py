"""The variants of LoRA on linear layers: one file each, and this one table of them. DoRA has other layers too: it is
in dora.py.

A variant is what computes on a layer, and what it does beside that in training. A field of LoraConfig is its switch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from siliang.methods.kasa import KasaLinear, kasa_loss
from siliang.methods.layer import LayerAdapter
from siliang.methods.lora_config import LoraConfig
from siliang.methods.low_rank import MakeLowRank


@dataclass(frozen=True)
class Variant:
    """A variant of LoRA.

    Attributes:
        kind: Gives what makes the adapter on the linear layer of this path.
        loss: The term that it adds to the loss, of its layers.
    """

    kind: Callable[[LoraConfig, str], MakeLowRank]
    loss: Callable[[Iterable[LayerAdapter]], Tensor] | None = None


def _kasa(config: LoraConfig, path: str) -> MakeLowRank:
    assert config.kasa_config is not None
    return partial(KasaLinear, settings=config.kasa_config)


VARIANTS: dict[str, Variant] = {
    "kasa_config": Variant(_kasa, loss=kasa_loss),
}


def variant_of(config: LoraConfig) -> Variant | None:
    """The variant that a config switches on; None for LoRA itself and for DoRA."""
    return VARIANTS.get(config.variant or "")
