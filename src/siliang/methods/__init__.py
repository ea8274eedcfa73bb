"""What is tuned: one file a method, and this one table of them."""

from __future__ import annotations

from dataclasses import dataclass

from siliang.methods.base import LayerConfig, PeftConfig, WrappedLayer
from siliang.methods.bitfit import BitFitConfig
from siliang.methods.head import HeadConfig
from siliang.methods.lora import LoraConfig, LoraLinear
from siliang.types import AdapterError, ConfigError, PeftType, nearest


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes:
        name: What the user writes in `method:`.
        config: Its config class; None for full fine-tuning, which attaches nothing.
        layer: The wrapped layer that it attaches; None where it trains parameters of the base model itself.
        learning_rate: The default when the user gives none, for a model with a new head (SEQ_CLS) or a causal one.
        learning_rate_source: Where that figure is from.
        trains: What it trains, in a few words.
    """

    name: str
    config: type[LayerConfig] | None
    layer: type[WrappedLayer] | None
    learning_rate: float
    learning_rate_source: str
    trains: str


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="lora",
            config=LoraConfig,
            layer=LoraLinear,
            learning_rate=5e-4,
            learning_rate_source="Hu et al. 2021, table 9: 4e-4 to 5e-4 for RoBERTa-base on GLUE",
            trains="low-rank updates of chosen linear layers",
        ),
        Method(
            name="bitfit",
            config=BitFitConfig,
            layer=None,
            learning_rate=1e-3,
            learning_rate_source="Ben Zaken et al. 2021, appendix A.2: 1e-4 to 1e-3",
            trains="every bias of the model",
        ),
        Method(
            name="head",
            config=HeadConfig,
            layer=None,
            learning_rate=1e-3,
            learning_rate_source="Adam's own default (Kingma and Ba 2014); a linear probe is not sensitive to it",
            trains="the task's head alone: the baseline",
        ),
        Method(
            name="full",
            config=None,
            layer=None,
            learning_rate=3e-5,
            learning_rate_source="Devlin et al. 2018, appendix A.3: 2e-5 to 5e-5",
            trains="every parameter",
        ),
    )
}


def find_method(name: str) -> Method:
    """The table's row for `name`.

    Raises:
        ConfigError: There is no such method.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise ConfigError(f"method {name!r} is not one of {', '.join(METHODS)}." + nearest(name, METHODS)) from None


def method_of(config: PeftConfig) -> Method:
    """The table's row for a config."""
    return next(m for m in METHODS.values() if m.config is type(config))


def config_class(peft_type: object, *, source: str) -> type[LayerConfig]:
    """The config class for the `peft_type` of an adapter file.

    Raises:
        AdapterError: siliang has no such method.
    """
    found = {m.config.peft_type: m.config for m in METHODS.values() if m.config is not None}
    try:
        return found[PeftType(str(peft_type))]
    except ValueError:
        raise AdapterError(
            f"{source}: peft_type {peft_type!r} is not a method of siliang ({', '.join(found)})."
        ) from None


__all__ = [
    "METHODS",
    "BitFitConfig",
    "HeadConfig",
    "LoraConfig",
    "Method",
    "config_class",
    "find_method",
    "method_of",
]
