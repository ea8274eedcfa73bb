"""An adapter whose initialization changed the base weight (PiSSA, OLoRA, CorDA, LoRA-GA), as LoRA on W itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from siliang.language import Bilingual
from siliang.methods.config import PeftConfig
from siliang.methods.learned_initialization import plain
from siliang.methods.lora_config import LoraConfig
from siliang.types import AdapterError, ConfigError

FACTORS = (".lora_A.weight", ".lora_embedding_A", ".lora_B.weight", ".lora_embedding_B")


def as_plain_lora(
    config: PeftConfig, tensors: dict[str, Tensor], initial: Callable[[], dict[str, Tensor]], source: str
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A trained adapter of such an initialization as LoRA of twice the rank.

    Args:
        config: The adapter's.
        tensors: The adapter's, by their keys in the file.
        initial: Reads the adapter as it was before training.
        source: Where `initial` reads it from, for an error.

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
    if other is not None or not config.initialization.convertible:
        what = other or f"init_lora_weights={config.init_lora_weights!r}"
        raise ConfigError(
            Bilingual(
                f"With {what} the change of the weight is not a product of B and A.",
                f"使用 {what} 时，权重的变化不是 B 与 A 的乘积。",
            )
        )
    found = twice_the_rank(tensors, initial(), source)
    more = math.sqrt(2) if config.use_rslora else 2  # with which s stays: it is alpha / sqrt(r), or alpha / r
    saved = dataclasses.replace(
        plain(config),
        r=2 * config.r,
        lora_alpha=config.lora_alpha * more,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: more * alpha for key, alpha in config.alpha_pattern.items()},
    )
    return saved, found


def twice_the_rank(tensors: dict[str, Tensor], initial: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """A trained adapter of such an initialization as LoRA of twice the rank, on the original base weight.

        W - s B0 A0 + s B A = W + s [B | -B0] [A ; A0]

    Args:
        tensors: The adapter's, by their keys in the file.
        initial: Its tensors before training.
        source: Where `initial` is from, for the error.

    Raises:
        AdapterError: `initial` is of another adapter.
    """
    found = {}
    for key, tensor in tensors.items():
        side = next((side for side in FACTORS if key.endswith(side)), None)
        if side is None:
            found[key] = tensor
            continue
        if key not in initial or initial[key].shape != tensor.shape:
            raise AdapterError(
                Bilingual(
                    f"{source} is not what this adapter started from: {key} is missing or of another shape.",
                    f"{source} 不是这个适配器的起点：{key} 缺失或形状不同。",
                )
            )
        before = initial[key].to(tensor)
        found[key] = torch.cat([tensor, before], 0) if "_A" in side else torch.cat([tensor, -before], 1)
    return found
