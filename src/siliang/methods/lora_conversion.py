"""An adapter whose start changed the base weight (PiSSA, OLoRA, CorDA, LoRA-GA), as LoRA on the original weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from torch import Tensor

from siliang.language import Bilingual
from siliang.methods.config import PeftConfig
from siliang.methods.lora_config import LoraConfig
from siliang.methods.lora_init import twice_the_rank
from siliang.methods.lora_start import plain
from siliang.types import ConfigError


def as_plain_lora(
    config: PeftConfig, tensors: dict[str, Tensor], start: Callable[[], dict[str, Tensor]], source: str
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A trained adapter of such a start as LoRA of twice the rank.

    Args:
        config: The adapter's.
        tensors: The adapter's, by their keys in the file.
        start: Reads the adapter as it was before training.
        source: Where `start` reads it from, for an error.

    Raises:
        ConfigError: The adapter cannot be converted.
        AdapterError: What was read is another adapter.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            Bilingual(
                f"Only LoRA can be converted to LoRA on the plain base model, not {config.peft_type}.",
                f"只有 LoRA 能转换成普通基座模型上的 LoRA，{config.peft_type} 不能。",
            )
        )
    other = config.variant if config.variant != "velora_config" else None  # whose update is LoRA's own
    if other is not None or config.init_lora_weights == "loftq":
        what = other or "init_lora_weights='loftq'"
        raise ConfigError(
            Bilingual(
                f"With {what} the change of the weight is not a product of B and A.",
                f"使用 {what} 时，权重的变化不是 B 与 A 的乘积。",
            )
        )
    found = twice_the_rank(tensors, start(), source)
    more = math.sqrt(2) if config.use_rslora else 2  # with which s stays: it is alpha / sqrt(r), or alpha / r
    saved = dataclasses.replace(
        plain(config),
        r=2 * config.r,
        lora_alpha=config.lora_alpha * more,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: more * alpha for key, alpha in config.alpha_pattern.items()},
    )
    return saved, found
