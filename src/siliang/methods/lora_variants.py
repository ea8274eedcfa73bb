"""The variants of LoRA on linear layers: one file each, and this one table of them. DoRA has other layers too: it is
in dora.py.

A variant is what computes on a layer, and what else it does in training. A field of LoraConfig is its switch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from siliang.methods import alora, arrow
from siliang.methods.alora import AloraLinear, check_model, follow_tokens
from siliang.methods.arrow import ArrowConfig, ArrowLinear, check_arrow
from siliang.methods.bdlora import bdlora_on
from siliang.methods.kasa import KasaLinear, kasa_loss
from siliang.methods.layer import LayerAdapter
from siliang.methods.lora_config import LoraConfig
from siliang.methods.low_rank import MakeLowRank
from siliang.methods.velora import VeloraLinear


@dataclass(frozen=True)
class Variant:
    """A variant of LoRA.

    Attributes:
        kind: Gives what makes the adapter on the linear layer of this path.
        check: Raises ConfigError where it cannot work on a base model.
        loss: The term that it adds to the loss, of its layers.
        add_hooks: Adds what it needs in the model's forward while it is active, and gives what removes that.
        why_not_merged: Why it cannot be merged; None where it can.
        mixes_rows: Whether it takes a mean over the rows of a batch, as `Method.mixes_rows`.
    """

    kind: Callable[[LoraConfig, str], MakeLowRank]
    check: Callable[[nn.Module, LoraConfig], None] | None = None
    loss: Callable[[Iterable[LayerAdapter]], Tensor] | None = None
    add_hooks: Callable[[nn.Module, LoraConfig, Iterable[LayerAdapter]], Callable[[], None]] | None = None
    why_not_merged: str | None = None
    mixes_rows: Callable[[LoraConfig], bool] | None = None


def _kasa(config: LoraConfig, path: str) -> MakeLowRank:
    assert config.kasa_config is not None
    return partial(KasaLinear, settings=config.kasa_config)


def _velora(config: LoraConfig, path: str) -> MakeLowRank:
    assert config.velora_config is not None
    return partial(VeloraLinear, settings=config.velora_config)


def _velora_mean(config: LoraConfig) -> bool:
    assert config.velora_config is not None
    return config.velora_config.init_type != "random"


def _arrow(config: LoraConfig) -> ArrowConfig:
    assert config.arrow_config is not None
    return config.arrow_config


def _bdlora(config: LoraConfig, path: str) -> MakeLowRank:
    assert config.use_bdlora is not None
    return bdlora_on(config.use_bdlora, path)


def _invocation(config: LoraConfig) -> list[int]:
    assert config.alora_invocation_tokens is not None
    return config.alora_invocation_tokens


VARIANTS: dict[str, Variant] = {
    "alora_invocation_tokens": Variant(
        lambda config, path: AloraLinear,
        check=lambda model, config: check_model(model, _invocation(config)),
        add_hooks=lambda model, config, layers: follow_tokens(model, layers, _invocation(config)),
        why_not_merged=alora.WHY_NOT_MERGED,
    ),
    "arrow_config": Variant(
        lambda config, path: partial(ArrowLinear, settings=_arrow(config)),
        check=lambda model, config: check_arrow(_arrow(config)),
        why_not_merged=arrow.WHY_NOT_MERGED,
    ),
    "kasa_config": Variant(_kasa, loss=kasa_loss),
    "use_bdlora": Variant(_bdlora),
    "velora_config": Variant(_velora, mixes_rows=_velora_mean),
}


def variant_of(config: LoraConfig) -> Variant | None:
    """The variant that a config switches on; None for LoRA itself and for DoRA."""
    return VARIANTS.get(config.variant or "")
