"""What is tuned: one file a method, and this one table of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from siliang.methods.base import PeftConfig, Prompt, PromptConfig, WrappedLayer
from siliang.methods.bitfit import BitFitConfig
from siliang.methods.head import HeadConfig
from siliang.methods.ia3 import IA3Config, IA3Linear
from siliang.methods.ln_tuning import LNTuningConfig, TunedNorm
from siliang.methods.lora import LoraConfig, LoraEmbedding, LoraLinear
from siliang.methods.p_tuning import PromptEncoderConfig, PromptEncoderReparameterizationType
from siliang.methods.prefix_tuning import PrefixTuningConfig
from siliang.methods.prompt_tuning import PromptTuningConfig, PromptTuningInit
from siliang.types import AdapterError, ConfigError, PeftType, nearest


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes:
        name: What the user writes in `method:`.
        config: Its config class; None for full fine-tuning, which attaches nothing.
        layers: The wrapped layers that it attaches, the first that supports a base layer is taken; none where it trains
            parameters of the base model itself, or virtual tokens.
        learning_rate: The default when the user gives none.
        learning_rate_source: Where that figure is from.
        trains: What it trains, in a few words.
    """

    name: str
    config: type[PeftConfig] | None
    layers: tuple[type[WrappedLayer], ...]
    learning_rate: float
    learning_rate_source: str
    trains: str

    @property
    def freezes_the_base(self) -> bool:
        """Whether the base model's own parameters all stay as they are, and so may be stored in half precision."""
        return bool(self.layers) or (self.config is not None and self.config.is_prompt_learning)

    @property
    def merges(self) -> bool:
        """Whether a run of it can be merged into its base model: virtual tokens cannot, and a full run is one."""
        return self.config is not None and not self.config.is_prompt_learning

    @staticmethod
    def make_prompt(config: PromptConfig, word_embeddings: nn.Module) -> Prompt:
        """A new prompt of the config's method."""
        assert isinstance(config, PromptTuningConfig | PromptEncoderConfig | PrefixTuningConfig)
        return config.make_prompt(word_embeddings)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "lora",
            LoraConfig,
            (LoraLinear, LoraEmbedding),
            5e-4,
            "Hu et al. 2021, table 9: 4e-4 to 5e-4 for RoBERTa-base on GLUE",
            "low-rank updates of chosen linear layers",
        ),
        Method(
            "ia3",
            IA3Config,
            (IA3Linear,),
            1e-2,
            "measured: 82% on SST-2 after 200 steps, 72% with the 3e-3 of Liu et al. 2022, section 3.5",
            "one factor for each key, value and feed-forward unit",
        ),
        Method(
            "ln_tuning",
            LNTuningConfig,
            (TunedNorm,),
            1e-2,
            "measured: 81% on SST-2 after 200 steps; Zhao et al. 2023 give none for language",
            "the norms' weights and biases",
        ),
        Method(
            "bitfit",
            BitFitConfig,
            (),
            1e-3,
            "Ben Zaken et al. 2021, appendix A.2: 1e-4 to 1e-3",
            "every bias of the model",
        ),
        Method(
            "prompt_tuning",
            PromptTuningConfig,
            (),
            3e-2,
            "measured: 78% on SST-2 after 300 steps; 59% after 200 with the 0.3 of Lester et al. 2021, appendix A.1",
            "virtual tokens before the text",
        ),
        Method(
            "p_tuning",
            PromptEncoderConfig,
            (),
            2e-2,
            "measured: 71% on SST-2 after 300 steps, 64% with 1e-2, 51% with 1e-3",
            "virtual tokens, through a small network",
        ),
        Method(
            "prefix_tuning",
            PrefixTuningConfig,
            (),
            1e-2,
            "PEFT's example for prefix tuning: 1e-2; Liu et al. 2021b, table 5: 5e-3 to 1e-2",
            "keys and values before every layer's own",
        ),
        Method(
            "head",
            HeadConfig,
            (),
            1e-3,
            "Adam's own default (Kingma and Ba 2014); a linear probe is not sensitive to it",
            "the task's head alone: the baseline",
        ),
        Method(
            "full",
            None,
            (),
            3e-5,
            "Devlin et al. 2018, appendix A.3: 2e-5 to 5e-5",
            "every parameter",
        ),
    )
}


def whole_name(name: str) -> str:
    """A method's name as the table has it, of Prompt-Tuning, p-tuning, prefix ..."""
    name = name.strip().lower().replace("-", "_")
    return f"{name}_tuning" if f"{name}_tuning" in METHODS else name


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


def config_class(peft_type: object, *, source: str) -> type[PeftConfig]:
    """The config class for the `peft_type` of an adapter file.

    Raises:
        AdapterError: siliang has no such method.
    """
    found = {m.config.peft_type: m.config for m in METHODS.values() if m.config is not None}
    try:
        return found[PeftType(str(peft_type))]
    except ValueError:
        hint = f" Write {str(peft_type).upper()!r}." if str(peft_type).upper() in found else ""
        raise AdapterError(
            f"{source}: peft_type {peft_type!r} is not a method of siliang ({', '.join(found)}).{hint}"
        ) from None


__all__ = [
    "METHODS",
    "BitFitConfig",
    "HeadConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoraConfig",
    "Method",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "config_class",
    "find_method",
    "method_of",
]
