"""Arrow's router over trained LoRA adapters, under the names of Hugging Face PEFT."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from siliang.language import Bilingual
from siliang.methods.arrow import EXPERT, GENERAL, ROUTER, ArrowConfig
from siliang.methods.lora_config import LoraConfig
from siliang.methods.low_rank import LowRank
from siliang.models.introspect import is_linear
from siliang.peft_api.model import PeftModel
from siliang.types import ConfigError


class LayerTypeError(ConfigError, TypeError):
    """An adapter is on other layers than linear ones; PEFT raises TypeError."""


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: list[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: list[str] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """A model that mixes trained LoRA adapters for each token, with the router "arrow_router" active.

    The adapters are task_0, task_1, ... and, of GenKnowSub, gks_0, gks_1, ...; they stay as they are. LoRA adapters
    that are loaded later are mixed too.

    Args:
        task_specific_adapter_paths: The folders of the adapters, or names on the hub: "user/repository/folder".
        arrow_config: Its names of adapters are filled in.
        general_adapter_paths: Those of GenKnowSub, with `use_gks`.
        adapter_kwargs: For `PeftModel.from_pretrained`.

    Raises:
        ConfigError: There are no adapters, they differ in ranks or layers, or are more than LoRA on linear layers. The
            base model is unchanged then.
        AdapterError: One cannot be loaded; likewise.
    """
    if isinstance(task_specific_adapter_paths, str) or not task_specific_adapter_paths:
        raise ConfigError(
            Bilingual(
                "task_specific_adapter_paths must be a list of at least one adapter.",
                "task_specific_adapter_paths 应为列表，至少含一个适配器。",
            )
        )
    if arrow_config.use_gks and not general_adapter_paths:
        raise ConfigError(
            Bilingual(
                "use_gks needs general_adapter_paths, the general LoRA adapters.",
                "use_gks 需要 general_adapter_paths，即通用的 LoRA 适配器。",
            )
        )
    if general_adapter_paths and not arrow_config.use_gks:
        message = Bilingual(
            "general_adapter_paths has no effect without ArrowConfig(use_gks=True): the adapters are not loaded.",
            "没有 ArrowConfig(use_gks=True) 时 general_adapter_paths 不起作用：这些适配器不会加载。",
        )
        warnings.warn(message, stacklevel=2)
    experts = {f"{EXPERT}{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    general = {f"{GENERAL}{i}": path for i, path in enumerate(general_adapter_paths or ()) if arrow_config.use_gks}
    (first, path), *rest = (experts | general).items()
    model = PeftModel.from_pretrained(base_model, adapter_name=first, **_source(path, adapter_kwargs))
    try:
        for name, path in rest:
            model.load_adapter(adapter_name=name, **_source(path, adapter_kwargs))
        arrow_config.task_adapter_names, arrow_config.gks_adapter_names = list(experts), list(general)
        ranks = _same_ranks(model)
        config = LoraConfig(
            arrow_config=dataclasses.replace(arrow_config),
            target_modules=_targets(model, list(ranks)),
            r=list(ranks.values())[-1],
        )
        model.add_adapter(ROUTER, config)
        model.set_adapter(ROUTER)
    except BaseException:
        model.unload()
        raise
    return model


def _source(path: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Where an adapter is: a folder, or a repository on the hub and a folder in it."""
    parts = str(path).strip("/").split("/")
    if Path(path).is_dir() or len(parts) < 3:
        return {"model_id": path} | arguments
    return {"model_id": "/".join(parts[:2]), "subfolder": "/".join(parts[2:])} | arguments


def _same_ranks(model: PeftModel) -> dict[str, int]:
    """The rank on each layer, by its path, which all adapters share.

    Raises:
        ConfigError: They differ in it, or are more than LoRA on linear layers.
    """
    first: tuple[str, dict[str, int]] | None = None
    for name, adapter in model.injection.adapters.items():
        config = model.peft_config[name]
        _check_plain(name, config)
        for path, layer in adapter.layers.items():
            if not isinstance(layer, LowRank) or not is_linear(layer.layer.base_layer):
                raise LayerTypeError(
                    Bilingual(
                        "LoRA adapters must only target Linear-like layers for Arrow, and "
                        f"{name!r} is on {path}. Choose another adapter.",
                        f"Arrow 的 LoRA 适配器只能作用于线性层，而 {name!r} 作用于 {path}。请另选适配器。",
                    )
                )
        ranks = {path: len(layer.A) for path, layer in adapter.layers.items() if isinstance(layer, LowRank)}
        if first is None:
            first = name, ranks
        if ranks.keys() != first[1].keys():
            raise ConfigError(
                Bilingual(
                    f"target_modules mismatch: adapters {name!r} and {first[0]!r} are on other layers, and Arrow mixes "
                    "adapters of the same layers.",
                    f"适配器 {name!r} 与 {first[0]!r} 作用的层不同（target_modules），而 Arrow 只组合层相同的适配器。",
                )
            )
        if ranks != first[1]:
            raise ConfigError(
                Bilingual(
                    f"rank mismatch: the ranks of adapters {name!r} and {first[0]!r} differ, and Arrow mixes adapters "
                    "of the same ranks.",
                    f"适配器 {name!r} 与 {first[0]!r} 的秩不同，而 Arrow 只组合秩相同的适配器。",
                )
            )
    assert first is not None
    return first[1]


def _check_plain(name: str, config: object) -> None:
    """
    Raises:
        ConfigError: The adapter is more than LoRA.
    """
    odd = None if isinstance(config, LoraConfig) else type(config).__name__
    if isinstance(config, LoraConfig):
        settings = (
            *LoraConfig.VARIANTS,
            "lora_bias",
            "layer_replication",
            "target_parameters",
            "bias",
            "modules_to_save",
        )
        plain = (None, False, "none", [])
        changed = config.initialization.changes_weight
        odd = f"init_lora_weights = {config.init_lora_weights!r}" if changed else None
        odd = odd or next((key for key in settings if getattr(config, key) not in plain), None)
        odd = odd or ("trainable_token_indices" if config.trainable_token_indices else None)
    if odd is not None:
        raise ConfigError(
            Bilingual(
                f"Adapter {name!r} has {odd}, and Arrow mixes plain LoRA on linear layers. Choose another adapter.",
                f"适配器 {name!r} 含有 {odd}，而 Arrow 只组合线性层上的普通 LoRA。请另选适配器。",
            )
        )


def _targets(model: PeftModel, paths: list[str]) -> list[str] | str:
    """target_modules of exactly these layers: the endings of their names, as PEFT writes them, where that is enough."""
    endings = {path.rpartition(".")[2] for path in paths}
    with model.injection.bare() as base:
        modules = list(base.named_modules())
    found = {path for path, layer in modules if path.rpartition(".")[2] in endings and is_linear(layer)}
    return sorted(endings) if found == set(paths) else "|".join(map(re.escape, paths))
