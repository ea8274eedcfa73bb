"""Where LoRA is on a model, and with which rank and scaling.

A config names layers (target_modules) and parameters (target_parameters); ensure_weight_tying takes an embedding and
its head as one; rank_pattern and alpha_pattern give some of them R and alpha of their own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from siliang.language import Bilingual
from siliang.methods.blocks import Blocks
from siliang.methods.find_targets import find_targets
from siliang.methods.layer_patterns import LayerPatterns
from siliang.methods.lora_config import LoraConfig
from siliang.methods.lora_experts import move_experts
from siliang.methods.lora_initialization import USUAL, Initialization
from siliang.methods.lora_parameters import find_parameters
from siliang.methods.low_rank import LoraSpec, LowRank, MakeLowRank
from siliang.methods.targets import LORA_TARGETS
from siliang.methods.tied_ends import Tied, targets_with, tied_for
from siliang.types import ConfigError

GPU = torch.device("cuda")


@dataclass(frozen=True)
class Chosen:
    """What a config names on a model.

    Attributes:
        layers: Paths; of a tied embedding and head, the embedding's.
        parameters: The names of parameters, by the path of their module.
        tied: The embedding and the head that are tied and among the targets.
    """

    layers: list[str]
    parameters: dict[str, list[str]]
    tied: Tied | None

    @property
    def parameter_paths(self) -> list[str]:
        return [f"{module}.{own}" for module, names in self.parameters.items() for own in names]

    @property
    def names(self) -> list[str]:
        """The paths of everything that has a rank."""
        return [*self.layers, *([] if self.tied is None else [self.tied.head]), *self.parameter_paths]


def choose(
    model: nn.Module,
    config: LoraConfig,
    kinds: Sequence[type[LowRank]],
    *,
    saved: Sequence[str],
    from_file: bool,
) -> Chosen:
    """The layers and parameters that a config names.

    Args:
        kinds: What LoRA can be on a layer.
        saved, from_file: As of `Method.attach`.

    Raises:
        TargetError: There are none.
        ConfigError: A setting does not go with what it names.
    """
    if not from_file:
        move_experts(model, config)
    tied = config.tied = _tied(model, config, from_file=from_file)
    if tied is not None and config.target_modules:
        config.target_modules = targets_with(tied, config.target_modules)
    parameters = find_parameters(model, config.target_parameters or (), outside=saved, lenient=from_file)
    layers: list[str] = []
    if not parameters or config.target_modules or (config.target_modules is None and LORA_TARGETS.find(model).paths):
        layers = find_targets(
            model,
            config,
            lambda layer: any(kind.supports(layer) for kind in kinds),
            defaults=LORA_TARGETS,
            outside=saved,
            lenient=from_file,
            blocks=Blocks.of(config.layers_to_transform, config.layers_pattern),
        )
    tied = tied if tied is not None and tied.embedding in layers else None
    return Chosen([path for path in layers if tied is None or path != tied.head], parameters, tied)


@dataclass(frozen=True)
class Specs:
    """LoRA on each layer or parameter that was chosen.

    Attributes:
        ranks, alphas: R and alpha of those that have their own, by path.
        init: What A, B and W begin with.
        norms_on: As of `LoraSpec`.
    """

    config: LoraConfig
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    init: Initialization
    norms_on: torch.device | None

    @classmethod
    def of(cls, config: LoraConfig, names: Sequence[str], *, from_file: bool) -> Specs:
        """Those of these paths. The config gets its patterns in a form of which the order does not count.

        Raises:
            ConfigError: A pattern matches nothing.
        """
        ranks = LayerPatterns("rank_pattern", config.rank_pattern, names)
        alphas = LayerPatterns("alpha_pattern", config.alpha_pattern, names)
        if not from_file:
            ranks.check_effect()
            alphas.check_effect()
        config.rank_pattern, config.alpha_pattern = ranks.in_any_order(), alphas.in_any_order()
        init = config.initialization
        if from_file and init.in_file:
            init = replace(USUAL, frozen_b=init.frozen_b)
        return cls(config, ranks.values, alphas.values, init, _norms_on(config))

    def at(self, path: str, kind: MakeLowRank) -> LoraSpec:
        """LoRA at a path."""
        config = self.config
        r, alpha = self.ranks.get(path, config.r), self.alphas.get(path, config.lora_alpha)
        return LoraSpec(
            kind=kind,
            r=r,
            alpha=alpha,
            scaling=alpha / math.sqrt(r) if config.use_rslora else alpha / r,
            dropout_p=config.lora_dropout,
            init=self.init,
            bias=config.lora_bias,
            norms_on=self.norms_on,
        )


def _tied(model: nn.Module, config: LoraConfig, *, from_file: bool) -> Tied | None:
    """What `ensure_weight_tying` ties among the targets."""
    if not config.ensure_weight_tying:
        return None
    targets, saved = tied_for(model, config.target_modules, config.modules_to_save)
    if targets is None and saved is None and not from_file and not config.trainable_token_indices:
        warnings.warn(
            Bilingual(
                "ensure_weight_tying has no effect: the model's embedding and head are not tied, or neither "
                "target_modules nor modules_to_save names embed_tokens or lm_head.",
                "ensure_weight_tying 不起作用：模型的嵌入层与输出头没有绑定，或者 target_modules 和 modules_to_save"
                " 都没有写 embed_tokens 或 lm_head。",
            ),
            stacklevel=4,
        )
    return targets


def _norms_on(config: LoraConfig) -> torch.device | None:
    """Where DoRA's norms are computed when it is made, as `runtime_config` has it.

    Raises:
        ConfigError: There is no GPU.
    """
    if not config.runtime_config.ephemeral_gpu_offload or not config.use_dora:
        return None
    if not torch.cuda.is_available():
        raise ConfigError(
            Bilingual(
                "runtime_config.ephemeral_gpu_offload needs a GPU, and there is none: leave it out.",
                "runtime_config.ephemeral_gpu_offload 需要 GPU，而这里没有：请去掉它。",
            )
        )
    return GPU
