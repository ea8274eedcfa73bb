"""Hot-swapping, under PEFT's names: another LoRA adapter's weights take the place of a loaded one's.

The tensors keep their shapes where the new rank is not larger: the rows of A and columns of B beyond it are zero.

Shapes: A (R, I), B (O, R).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from siliang.adapters.adapted_layer import AdaptedLayer
from siliang.language import Bilingual
from siliang.methods.config import PeftConfig
from siliang.methods.layer_patterns import LayerPatterns
from siliang.methods.lora_config import LoraConfig
from siliang.methods.low_rank import LowRank
from siliang.peft_api.checks import check_known
from siliang.peft_api.model import PeftModel
from siliang.peft_api.saved import SavedAdapter, for_hub
from siliang.peft_api.weighted import lora_layers
from siliang.types import ConfigError

SAME = ("use_dora", "use_rslora", "lora_dropout")  # of the two configs


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: str | torch.device | None = None,
    **kwargs: Any,
) -> None:
    """Gives adapter `adapter_name` the weights and scalings of another LoRA adapter, whose layers are among its own.

    Args:
        model: A PeftModel, compiled or not.
        model_name_or_path: The other adapter's folder, or its name on the hub.
        torch_device: Without effect: an adapter is where its layers are.
        kwargs: `subfolder`, and what the hub is asked with.

    Raises:
        ConfigError: The adapter is merged, or the other one does not fit. The model is unchanged then.
        AdapterError: The files are damaged or incomplete.
    """
    peft_model: object = getattr(model, "_orig_mod", model)
    if not isinstance(peft_model, PeftModel):
        raise ConfigError(
            Bilingual(
                f"hotswap_adapter needs a PeftModel, not {type(peft_model).__name__}: see get_peft_model.",
                f"hotswap_adapter 需要 PeftModel，而不是 {type(peft_model).__name__}：见 get_peft_model。",
            )
        )
    check_known(adapter_name, peft_model.peft_config)
    saved = SavedAdapter.read(model_name_or_path, is_trainable=False, with_training=False, **for_hub(kwargs))
    saved = saved.on(peft_model.injection)
    check_hotswap_configs_compatible(peft_model.peft_config[adapter_name], saved.config)
    assert isinstance(saved.config, LoraConfig)
    state = {_with_name(key, adapter_name): t for key, t in saved.tensors.items()}
    hotswap_adapter_from_state_dict(model, state, adapter_name, saved.config)


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """
    Raises:
        ConfigError: Weights of an adapter with `config1` cannot take the place of those of one with `config0`.
    """
    for config in (config0, config1):
        _check_plain(config)
    for key in SAME:
        own, other = getattr(config0, key), getattr(config1, key)
        if own != other:
            raise ConfigError(
                Bilingual(
                    f"{key} = {other!r}, and the loaded adapter has {own!r}: load it under another name.",
                    f"{key} = {other!r}，而已加载的适配器中是 {own!r}：请用另一个名称加载。",
                )
            )


def _check_plain(config: PeftConfig) -> None:
    """
    Raises:
        ConfigError: Tensors of an adapter with this config are not all that its layers compute with.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            Bilingual(
                f"Hot-swapping is for LORA, not {config.peft_type}: use load_adapter.",
                f"热切换只用于 LORA，不能用于 {config.peft_type}：请用 load_adapter。",
            )
        )
    if config.initialization.changes_weight:
        raise ConfigError(
            Bilingual(
                f"init_lora_weights = {config.init_lora_weights!r} belongs to a changed base weight: save the "
                "adapter as plain LoRA, or use load_adapter.",
                f"init_lora_weights = {config.init_lora_weights!r} 属于改动过的基座权重：请把适配器存为普通 LoRA，"
                "或使用 load_adapter。",
            )
        )
    if config.variant not in (None, "use_dora"):
        raise ConfigError(
            Bilingual(
                f"Hot-swapping is for LoRA and DoRA, not with {config.variant}: use load_adapter.",
                f"热切换只用于 LoRA 和 DoRA，不能与 {config.variant} 一起使用：请用 load_adapter。",
            )
        )


@torch.no_grad()
def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """As `hotswap_adapter`, with tensors under the model's own keys, such as "<layer>.lora_A.<adapter>.weight".

    Layers that `state_dict` lacks keep an update of zero. The adapter's config gets the ranks and alphas that the model
    has then, so that it can be saved.

    Args:
        config: Of the tensors: their ranks and alphas.
        parameter_prefix: Without effect: LoRA's is "lora_".

    Raises:
        ConfigError: The adapter is merged, or a tensor does not fit. The model is unchanged then.
    """
    _check_plain(config)
    model = getattr(model, "_orig_mod", model)
    layers = _lora_layers(model, adapter_name)
    keys = {
        (path, key): f"{path}.{first}.{adapter_name}{dot}{last}"
        for path, adapter in layers.items()
        for key in adapter.tensors()
        for first, dot, last in [key.partition(".")]
    }
    if unexpected := sorted(state_dict.keys() - set(keys.values())):
        raise ConfigError(
            Bilingual(
                f"{len(unexpected)} tensors have no place in adapter {adapter_name!r}, the first is {unexpected[0]}.",
                f"有 {len(unexpected)} 个张量在适配器 {adapter_name!r} 中没有对应位置，第一个是 {unexpected[0]}。",
            )
        )
    new: dict[str, dict[str, Tensor]] = {path: {} for path in layers}
    for (path, key), name in keys.items():
        own = layers[path].tensors()[key]
        given = state_dict.get(name, own if "magnitude" in key else torch.zeros_like(own))
        rank = _rank_dimension(key)
        fits = given.ndim == own.ndim and all(
            a == b for i, (a, b) in enumerate(zip(given.shape, own.shape, strict=True)) if i != rank
        )
        if not fits:
            raise ConfigError(
                Bilingual(
                    f"{name} has shape {tuple(given.shape)}, and the model {tuple(own.shape)}: it is of another model.",
                    f"{name} 的形状是 {tuple(given.shape)}，而模型中是 {tuple(own.shape)}：它属于别的模型。",
                )
            )
        new[path][key] = given.to(own)
    plain = [path.removeprefix("base_model.model.") for path in layers]
    ranks = LayerPatterns("rank_pattern", config.rank_pattern, plain).values
    alphas = LayerPatterns("alpha_pattern", config.alpha_pattern, plain).values
    for (path, adapter), where in zip(layers.items(), plain, strict=True):
        r = ranks.get(where, config.r)
        adapter.config_scaling = alphas.get(where, config.lora_alpha) / (math.sqrt(r) if config.use_rslora else r)
        _set_scaling(adapter, adapter.config_scaling)
        tensors = new[path]
        found = [t.shape[i] for key, t in tensors.items() if (i := _rank_dimension(key)) is not None]
        rank = max(len(adapter.A), *found)
        for key, tensor in tensors.items():
            _set_tensor(adapter, key, tensor, rank)
    _update_configs(model)


@torch.no_grad()
def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Makes a model with a LoRA adapter ready to be compiled and swapped: other ranks and alphas compile nothing anew.

    Args:
        target_rank: The highest rank of all adapters to come, to which the loaded ones are padded with zeros.
        config: Configs whose ranks become `target_rank`.
        check_compiled: What to do where the model is compiled already.

    Raises:
        ConfigError: The model is compiled, has no LoRA adapter, or one of a higher rank.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ConfigError(
            Bilingual(
                f"check_compiled = {check_compiled!r}: must be 'error', 'warn' or 'ignore'.",
                f"check_compiled = {check_compiled!r}：只能是 'error'、'warn' 或 'ignore'。",
            )
        )
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
        message = Bilingual(
            "The model is compiled already: call prepare_model_for_compiled_hotswap before torch.compile.",
            "模型已编译：请在 torch.compile 之前调用 prepare_model_for_compiled_hotswap。",
        )
        if check_compiled == "error":
            raise ConfigError(message)
        if check_compiled == "warn":
            warnings.warn(message, stacklevel=2)
    adapters = lora_layers(model)
    if not adapters:
        raise ConfigError(
            Bilingual("The model has no LoRA adapter: load the first one.", "模型上没有 LoRA 适配器：请先加载一个。")
        )
    if target_rank is not None and (most := max(len(adapter.A) for adapter in adapters)) > target_rank:
        raise ConfigError(
            Bilingual(
                f"target_rank = {target_rank}: must be at least the loaded adapters' rank, {most}.",
                f"target_rank = {target_rank}：不能小于已加载的适配器的秩 {most}。",
            )
        )
    if target_rank is not None and any(adapter.B.shape[1] != len(adapter.A) for adapter in adapters):
        raise ConfigError(
            Bilingual(
                "target_rank: LoRA on a convolution in groups cannot be padded to another rank.",
                "target_rank：分组卷积上的 LoRA 不能补零到别的秩。",
            )
        )
    for adapter in adapters:
        if not isinstance(adapter.s, Tensor):  # a number would be compiled in
            vars(adapter)["s"] = torch.tensor(adapter.s, device=adapter.A.device)
        for key, tensor in adapter.tensors().items() if target_rank is not None else ():
            _set_tensor(adapter, key, tensor, target_rank or 0)
    if target_rank is None:
        return
    for one in [config] if isinstance(config, LoraConfig) else (config or {}).values():
        one.r, one.rank_pattern = target_rank, dict.fromkeys(one.rank_pattern, target_rank)
    _update_configs(model)


def _lora_layers(model: nn.Module, name: str) -> dict[str, LowRank]:
    """What LoRA adapter `name` is on each of its layers, by the layer's path.

    Raises:
        ConfigError: There is none, or it is merged, or its initialization changed the base weights.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, AdaptedLayer)}
    check_known(name, {name for layer in layers.values() for name in layer.adapters})
    if any(name in layer.merged for layer in layers.values()):
        raise ConfigError(
            Bilingual(
                f"Adapter {name!r} is merged into the weights: call unmerge_adapter() before swapping.",
                f"适配器 {name!r} 已合并到权重中：请先调用 unmerge_adapter() 再切换。",
            )
        )
    own = {path: layer.adapters[name] for path, layer in layers.items() if name in layer.adapters}
    found = {path: adapter for path, adapter in own.items() if isinstance(adapter, LowRank)}
    grouped = any(adapter.B.shape[1] != len(adapter.A) for adapter in found.values())
    if len(found) < len(own) or grouped or any(adapter.residual is not None for adapter in found.values()):
        raise ConfigError(
            Bilingual(
                f"Adapter {name!r} is not plain LoRA (such as trained tokens, convolutions in groups, or an "
                "initialization that changes the base weight): use load_adapter.",
                f"适配器 {name!r} 不是普通的 LoRA（例如训练了个别词元、用于分组卷积，或初始化改动了基座权重）："
                "请用 load_adapter。",
            )
        )
    return found


def _with_name(key: str, name: str) -> str:
    """The model's key of what a file calls `key`."""
    return re.sub(r"\.(lora_\w+)(?=\.|$)", rf".\1.{name}", key)


def _rank_dimension(key: str) -> int | None:
    """Which dimension of a tensor of LoRA is its rank."""
    return {"lora_A.weight": 0, "lora_embedding_A": 0, "lora_B.weight": 1, "lora_embedding_B": 1}.get(key)


def _set_scaling(adapter: LowRank, s: float) -> None:
    """Sets what the layer computes with; in place where it is a tensor, which compiled code reads."""
    if isinstance(adapter.s, Tensor):
        adapter.s.fill_(s)
    else:
        adapter.s = s


def _set_tensor(adapter: LowRank, key: str, tensor: Tensor, rank: int) -> None:
    """Gives the adapter a tensor, padded with zeros to `rank`; in place where the shape is the same."""
    own, dimension = adapter.tensors()[key], _rank_dimension(key)
    if dimension is not None:
        shape = list(tensor.shape)
        shape[dimension] = rank
        padded = own.new_zeros(shape)
        padded.narrow(dimension, 0, tensor.shape[dimension]).copy_(tensor)
        tensor = padded
    if tensor.shape == own.shape:
        own.copy_(tensor)
        return
    parameter = nn.Parameter(tensor, requires_grad=own.requires_grad)
    attribute = key.partition(".")[0]
    part = adapter.layer.part(attribute, adapter.name)
    if isinstance(part, nn.Module):
        part.register_parameter("weight", parameter)
        if isinstance(part, nn.Linear):
            part.out_features, part.in_features = parameter.shape
    else:
        adapter.layer.add_part(attribute, adapter.name, parameter)


def _update_configs(model: nn.Module) -> None:
    """Gives a PeftModel's LoRA configs the ranks and alphas that its layers have, so that it can be saved."""
    for name, config in model.peft_config.items() if isinstance(model, PeftModel) else ():
        if not isinstance(config, LoraConfig):
            continue
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for path, layer in model.named_modules():
            if isinstance(layer, AdaptedLayer) and isinstance(adapter := layer.adapters.get(name), LowRank):
                key, r = f"^{re.escape(path.removeprefix('base_model.model.'))}", len(adapter.A)
                alpha = adapter.config_scaling * (math.sqrt(r) if config.use_rslora else r)
                ranks[key], alphas[key] = r, round(alpha) if math.isclose(alpha, round(alpha)) else alpha
                adapter.settings = {**adapter.settings, "r": r, "lora_alpha": alphas[key]}
        config.r, config.lora_alpha = max(ranks.values()), max(alphas.values())
        config.rank_pattern = {key: r for key, r in ranks.items() if r != config.r}
        config.alpha_pattern = {key: alpha for key, alpha in alphas.items() if alpha != config.lora_alpha}
