"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models
(Ben Zaken et al., 2021, arXiv:2106.10199).

    every layer's y = f(W x + b): W stays, b is trained

Nothing is added: the trained bias replaces the old one, so the forward costs what the base model's does, and the base's
own bias is kept for `unload` and `disable_adapter`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from siliang.language import Bilingual
from siliang.methods.config import PeftConfig
from siliang.methods.method import Method, Parts
from siliang.module_paths import inside, parameter_paths
from siliang.types import PeftType, TargetError


@dataclass(kw_only=True)
class BitFitConfig(PeftConfig):
    """BitFit has no settings of its own: every existing bias is trained, and nothing else."""

    peft_type: ClassVar[str] = PeftType.BITFIT


class BitFit(Method[BitFitConfig]):
    """Every bias of the model, outside the modules that are saved whole."""

    name = "bitfit"
    config = BitFitConfig
    learning_rate = 1e-3
    learning_rate_source = Bilingual(
        "Ben Zaken et al. 2021, appendix A.2: 1e-4 to 1e-3",
        "Ben Zaken 等 2021，附录 A.2：1e-4 至 1e-3",
    )
    trains = Bilingual("every bias of the model", "模型的全部偏置")
    freezes_the_base = False
    tunes = "biases"

    def attach(self, model: nn.Module, config: BitFitConfig, *, saved: Sequence[str], from_file: bool) -> Parts:
        biases = bias_paths(model, outside=saved)
        if not biases:
            model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            raise TargetError(
                Bilingual(
                    f"BitFit trains biases, and this model ({model_type}) has none. "
                    "Use LoRA instead: method: lora, or LoraConfig().",
                    f"BitFit 训练偏置，而这个模型（{model_type}）没有偏置。请改用 LoRA：method: lora，"
                    "或 LoraConfig()。",
                )
            )
        return Parts(parameters=tuple(biases))


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias, by its own name: `bias`, an LSTM's `bias_ih_l0`, attention's `in_proj_bias`.

    T5's `relative_attention_bias.weight` is an embedding table and is none.
    """
    own = name.rpartition(".")[2]
    return own == "bias" or own.startswith("bias_") or own.endswith("_bias")


def bias_paths(model: nn.Module, *, outside: Sequence[str]) -> list[str]:
    """The paths of every bias in a base model, a shared one under each of its paths.

    Args:
        outside: Modules whose biases do not count.
    """
    return [path for path, _ in parameter_paths(model) if is_bias(path) and not inside(path, outside)]


def chosen_biases(model: nn.Module, bias: str, layers: Collection[str], *, outside: Sequence[str]) -> tuple[str, ...]:
    """The base biases that a config's `bias` trains: those called so, as in PEFT, which an attention's in_proj_bias is
    not.

    Args:
        bias: "none", "all", or of the tuned layers alone ("lora_only" and the like).
        layers: The tuned layers.
        outside: Modules that are saved whole, whose biases do not count.
    """
    if bias == "none":
        return ()
    parts = [path.rpartition(".") for path in bias_paths(model, outside=outside)]
    everywhere = [(owner, f"{owner}{dot}{own}") for owner, dot, own in parts if own == "bias"]
    return tuple(path for owner, path in everywhere if bias == "all" or owner in layers)
