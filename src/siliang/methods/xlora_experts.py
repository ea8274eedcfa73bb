"""The experts of X-LoRA: LoRA adapters that were trained before, read from their folders.

Shapes: A (R, I), B (O, R).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from siliang.hub import adapter_folder
from siliang.language import Bilingual
from siliang.methods.layer_patterns import LayerPatterns
from siliang.methods.lora_config import LoraConfig
from siliang.models.introspect import features, is_linear
from siliang.types import ConfigError
from siliang.weight_files import read_adapter

# Settings with which a trained adapter is more than s B A on layers of the base model.
NOT_PLAIN = (*LoraConfig.VARIANTS, "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices")


@dataclass(frozen=True)
class Expert:
    """An expert on a layer.

    Attributes:
        number: Which of the experts.
        A, B: (R, I) and (O, R), B with its scaling.
    """

    number: int
    A: Tensor
    B: Tensor


def read_expert(model: nn.Module, name: str, folder: str, number: int) -> dict[str, Expert]:
    """A trained LoRA adapter by the layers that it is on.

    Raises:
        AdapterError: It cannot be read.
        ConfigError: It is more than LoRA on linear layers of this model.
    """
    with unset_fake_temporarily():
        config = LoraConfig.from_pretrained(folder)
        tensors = read_adapter(adapter_folder(folder))
    found: dict[str, dict[str, Tensor]] = {}
    odd = next((f for f in NOT_PLAIN if getattr(config, f)), None)
    if config.initialization.changes_weight:
        odd = f"init_lora_weights = {config.init_lora_weights!r}"
    for key, tensor in tensors.items():
        path, _, factor = key.removeprefix("base_model.model.").rpartition(".lora_")
        if factor not in ("A.weight", "B.weight"):
            odd = odd or key
        found.setdefault(path, {})[factor[:1]] = tensor
    if odd is not None:
        raise ConfigError(
            Bilingual(
                f"adapters: {name!r} has {odd}, and X-LoRA mixes plain LoRA on linear layers. Choose another expert.",
                f"adapters：{name!r} 含有 {odd}，而 X-LoRA 只组合线性层上的普通 LoRA。请另选专家。",
            )
        )
    modules = dict(model.named_modules())
    if (of_experts := next((path for path in found if ".experts." in path and path not in modules), None)) is not None:
        raise ConfigError(
            Bilingual(
                f"adapters: {name!r} has {of_experts}, no layer of this model, whose experts are one tensor: X-LoRA "
                "mixes LoRA on linear layers. Choose another adapter.",
                f"adapters：{name!r} 含有 {of_experts}，是混合模型中专家的层，现在合并在一个张量里："
                "X-LoRA 只组合线性层上的 LoRA。请另选适配器。",
            )
        )
    alphas = LayerPatterns("alpha_pattern", config.alpha_pattern, list(found)).values
    experts = dict[str, Expert]()
    for path, pair in found.items():
        layer, (A, B) = modules.get(path), (pair.get(factor, torch.empty(0, 0)) for factor in "AB")
        if layer is None or not is_linear(layer) or (*A.shape, *B.shape) != (len(A), *features(layer), len(A)):
            raise ConfigError(
                Bilingual(
                    f"adapters: {name!r} does not fit {path}: was it trained on another base model?",
                    f"adapters：{name!r} 与 {path} 不符：它是在别的基座模型上训练的吗？",
                )
            )
        alpha, R = alphas.get(path, config.lora_alpha), len(A)
        experts[path] = Expert(number, A, B * (alpha / math.sqrt(R) if config.use_rslora else alpha / R))
    return experts
