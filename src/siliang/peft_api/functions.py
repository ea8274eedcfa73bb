"""The functions of Hugging Face PEFT, under their names."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from siliang.adapters.adapted_layer import AdaptedLayer
from siliang.adapters.files import load_tensors
from siliang.hub import adapter_folder
from siliang.language import Bilingual
from siliang.methods.config import PeftConfig, config_class
from siliang.models.checkpointing import enable_checkpointing
from siliang.peft_api.model import PeftModel
from siliang.peft_api.tuners import TUNERS, TunerModel
from siliang.types import ConfigError, SiliangError
from siliang.weight_files import read_adapter

M = TypeVar("M", bound=PreTrainedModel)


def get_peft_config(config_dict: dict[str, object]) -> PeftConfig:
    """The config for a dictionary such as {"peft_type": "LORA", "r": 16}.

    Raises:
        AdapterError: The method is none of siliang's, or a field that it does not support would change the result.
    """
    return config_class(config_dict.get("peft_type"), source="config_dict").from_dict(config_dict, source="config_dict")


def get_peft_model_state_dict(
    model: PeftModel,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """What an adapter consists of, under the keys of its file.

    Args:
        state_dict: The whole model's, to take the values from, such as one that was gathered from several devices.
        unwrap_compiled: The model may be one that torch.compile gave.
        save_embedding_layers: The embeddings and the head too. "auto": where the adapter has others than the base, or
            they have another size than in the config of the base model's folder.

    Raises:
        ConfigError: The adapter is not there.
        AdapterError: `state_dict` lacks a part of it.
    """
    model = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    return {key: t.detach() for key, t in model.adapter_state(adapter_name, state_dict, save_embedding_layers).items()}


def set_peft_model_state_dict(
    model: PeftModel, peft_model_state_dict: dict[str, Tensor], adapter_name: str = "default"
) -> None:
    """Copies tensors under the keys of a file into an adapter.

    Raises:
        AdapterError: They do not fit; nothing has been copied then.
    """
    load_tensors(model.injection, adapter_name, peft_model_state_dict, source="peft_model_state_dict")


def prepare_model_for_kbit_training(
    model: M,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, object] | None = None,
) -> M:
    """Freezes a quantized model and turns gradient checkpointing on, non-reentrant by default.

    PEFT's function of this name also copies every 16-bit parameter to fp32: the norms, and a whole embedding and output
    layer, gigabytes for a large vocabulary. Frozen weights gain nothing by it, and adapters are fp32 anyway.
    """
    for p in model.parameters():
        p.requires_grad_(False)
    if use_gradient_checkpointing:
        settings = gradient_checkpointing_kwargs or {}
        if settings.get("use_reentrant"):
            model.enable_input_require_grads()  # reentrant checkpoints see no gradient where no input asks for one
        enable_checkpointing(model, **settings)
    return model


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Puts adapters into the layers of a model, which is returned itself and not wrapped.

    Args:
        low_cpu_mem_usage: Without effect: an adapter is made once, where it is used.
        state_dict: An adapter's tensors, by keys with or without the name of the adapter. The layers are those that it
            names, whatever the config has; its values are not used.

    Raises:
        ConfigError: The method is not one of adapters in layers.
    """
    if peft_config.is_prompt_learning:
        raise ConfigError(
            Bilingual(
                "inject_adapter_in_model is for adapters in layers: get_peft_model is for prompts.",
                "inject_adapter_in_model 用于层内的适配器：提示类方法请用 get_peft_model。",
            )
        )
    if state_dict is not None:
        peft_config = copy.deepcopy(peft_config)
        paths = sorted({path for key in state_dict if (path := _layer_of(key, model)) is not None})
        if not paths:
            raise ConfigError(
                Bilingual(
                    "state_dict names no layer of the model: its keys are like 'layers.0.q_proj.lora_A.weight'.",
                    "state_dict 中没有模型的任何一层：它的键形如 'layers.0.q_proj.lora_A.weight'。",
                )
            )
        vars(peft_config)["target_modules"] = "|".join(map(re.escape, paths))
    holder = model.__dict__.get("siliang_tuner")
    if isinstance(holder, TunerModel):
        holder.inject(adapter_name, peft_config)
    else:
        kind = TUNERS.get(peft_config.peft_type, TunerModel)
        model.__dict__["siliang_tuner"] = kind(model, peft_config, adapter_name)
    return model


def _layer_of(key: str, model: nn.Module) -> str | None:
    """The layer that a key of an adapter names."""
    path = key.removeprefix("base_model.model.")
    while path:
        path = path.rpartition(".")[0]
        with suppress(AttributeError):
            model.get_submodule(path)
            return path or None
    return None


def get_base_model_state_dict(model: PeftModel) -> dict[str, Tensor]:
    """The base model's own state, by its own keys, without anything of the adapters."""
    with model.injection.bare() as base:
        return dict(base.state_dict())


def set_base_model_state_dict(model: PeftModel, state_dict: dict[str, Tensor], strict: bool = True) -> object:
    """Loads the base model's own state, by its own keys.

    Returns:
        What `load_state_dict` gives: missing and unexpected keys.

    Raises:
        RuntimeError: With `strict`, keys are missing or unexpected.
    """
    with model.injection.bare() as base:
        return base.load_state_dict(state_dict, strict=strict)


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within the block the scalings of all adapters are multiplied.

    Raises:
        ConfigError: No adapter has a scaling.
        TypeError: `multiplier` is not a number.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, int | float):
        raise TypeError(
            Bilingual(f"multiplier = {multiplier!r}: must be a number.", f"multiplier = {multiplier!r}：必须是数。")
        )
    before = {module: dict(module.scaling) for module in model.modules() if isinstance(module, AdaptedLayer)}
    if not any(before.values()):
        raise ConfigError(
            Bilingual(
                "No adapter of the model has a scaling, such as LoRA's.", "模型的适配器都没有 LoRA 那样的缩放系数。"
            )
        )
    try:
        for layer, scalings in before.items():
            layer.scaling.update({name: s * multiplier for name, s in scalings.items()})
        yield
    finally:
        for layer, scalings in before.items():
            layer.scaling.update(scalings)


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Changes nothing: siliang casts its small matrices to the inputs' dtype, never the inputs."""
    yield


def check_if_peft_model(model_name_or_path: str | Path) -> bool:
    """Whether a folder, or a name on the hub, is an adapter that siliang reads."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except SiliangError:
        return False
    return True


def load_peft_weights(model_id: str | Path, device: str | torch.device | None = None, **hub: Any) -> dict[str, Tensor]:
    """The tensors of an adapter's file, on `device` (the CPU).

    Args:
        hub: `subfolder`, and what the hub is asked with.

    Raises:
        AdapterError: The file is missing or damaged.
    """
    return {key: t.to(device or "cpu") for key, t in read_adapter(adapter_folder(model_id, **hub)).items()}


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts what is frozen to `dtype`, a half precision, and what is trained to fp32."""
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)
