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

from siliang.adapters.adapted_layer import AdaptedLayer, ByAdapter
from siliang.adapters.adapter_state import adapter_state
from siliang.adapters.files import load_tensors
from siliang.hub import adapter_folder
from siliang.language import Bilingual
from siliang.methods.config import PeftConfig, config_class
from siliang.methods.lora_config import LoraConfig
from siliang.methods.lora_experts import tensors_by_present_names
from siliang.models.checkpointing import enable_checkpointing
from siliang.peft_api.checks import check_known
from siliang.peft_api.model import PeftModel
from siliang.peft_api.saved import LoadResult
from siliang.peft_api.tuner import TunerModel
from siliang.peft_api.tuners import TUNERS
from siliang.types import ConfigError, KindError, SiliangError
from siliang.weight_files import read_adapter

M = TypeVar("M", bound=PreTrainedModel)


def get_peft_config(config_dict: dict[str, object]) -> PeftConfig:
    """The config for a dictionary such as {"peft_type": "LORA", "r": 16}.

    Raises:
        AdapterError: The method is none of siliang's, or a field that it does not support would change the result.
    """
    return config_class(config_dict.get("peft_type"), source="config_dict").from_dict(config_dict, source="config_dict")


def get_peft_model_state_dict(
    model: nn.Module,
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
    if isinstance(inner := getattr(model, "module", model), PeftModel):
        found = inner.adapter_state(adapter_name, state_dict, save_embedding_layers)
    else:
        injection = injection_of(model)
        check_known(adapter_name, injection.adapters)
        live = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        keys = {id(t): key for key, t in live}
        found = adapter_state(
            injection, adapter_name, state_dict=state_dict, keys=keys, embeddings=save_embedding_layers
        )
        found = {_plain(key): t for key, t in found.items()}
    return {key: t.detach() for key, t in found.items()}


def _plain(key: str) -> str:
    """A key of a file as it is for a model that is not wrapped."""
    return key.removeprefix("base_model.").removeprefix("model.")


def injection_of(model: nn.Module) -> TunerModel:
    """What is attached to a model: by get_peft_model, or by inject_adapter_in_model.

    Raises:
        KindError: Nothing is.
    """
    model = getattr(model, "module", model)  # of a model that FSDP or DDP wraps
    found = model.injection if isinstance(model, PeftModel) else vars(model).get("siliang_tuner", model)
    if isinstance(found, TunerModel):
        return found
    raise KindError(
        Bilingual(
            f"{type(model).__name__} has no adapters: get_peft_model or inject_adapter_in_model attaches them.",
            f"{type(model).__name__} 没有适配器：请用 get_peft_model 或 inject_adapter_in_model 接上。",
        )
    )


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Copies tensors under the keys of a file into an adapter.

    Args:
        model: A PeftModel, or one of inject_adapter_in_model, whose keys have no `base_model.model.` before them.
        low_cpu_mem_usage: Without effect: the values are copied to where the adapter is.

    Returns:
        What is missing and unexpected: nothing.

    Raises:
        AdapterError: They do not fit; nothing has been copied then.
    """
    injection, tensors = injection_of(model), peft_model_state_dict
    check_known(adapter_name, injection.adapters)
    config = injection.adapters[adapter_name].config
    if isinstance(config, LoraConfig):
        with injection.bare() as base:
            tensors = tensors_by_present_names(base, config, tensors, source="peft_model_state_dict")
    if not isinstance(model, PeftModel):
        wrapped = {_plain(key): key for key in injection.adapters[adapter_name].tensors()}
        tensors = {wrapped.get(_plain(key), f"base_model.model.{_plain(key)}"): t for key, t in tensors.items()}
    load_tensors(injection, adapter_name, tensors, source="peft_model_state_dict")
    return LoadResult([], [])


def prepare_model_for_kbit_training(
    model: M,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, object] | None = None,
    auto_clear_cache: bool = True,
) -> M:
    """Freezes a quantized model and turns gradient checkpointing on, non-reentrant by default.

    Args:
        auto_clear_cache: Without effect: nothing is copied, so that nothing is left over.

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
    kind = TUNERS.get(peft_config.peft_type, TunerModel)
    if kind.uses_shared_state:
        raise ConfigError(
            Bilingual(
                f"The layers of {peft_config.peft_type} have shared state, for which a model without a wrapper has no "
                "place: use get_peft_model.",
                f"{peft_config.peft_type} 的各层共用张量，未包装的模型无处存放：请用 get_peft_model。",
            )
        )
    holder = model.__dict__.get("siliang_tuner")
    if isinstance(holder, TunerModel):
        holder.inject(adapter_name, peft_config)
    else:
        holder = model.__dict__["siliang_tuner"] = kind(model, peft_config, adapter_name)
    for name, shared in holder.named_children():
        if isinstance(shared, ByAdapter):  # so that it moves with the model
            model._modules[name] = shared
    model.__dict__["peft_config"] = holder.peft_config
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


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base model's own state, by its own keys, without anything of the adapters."""
    with injection_of(model).bare() as base:
        return dict(base.state_dict())


def set_base_model_state_dict(model: nn.Module, state_dict: dict[str, Tensor], strict: bool = True) -> object:
    """Loads the base model's own state, by its own keys.

    Returns:
        What `load_state_dict` gives: missing and unexpected keys.

    Raises:
        RuntimeError: With `strict`, keys are missing or unexpected.
    """
    with injection_of(model).bare() as base:
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
    before = {module: module.scaling for module in model.modules() if isinstance(module, AdaptedLayer)}
    if not any(before.values()):
        raise ConfigError(
            Bilingual(
                "No adapter of the model has a scaling, such as LoRA's.", "模型的适配器都没有 LoRA 那样的缩放系数。"
            )
        )
    try:
        for layer, scalings in before.items():
            layer.scaling = {name: s * multiplier for name, s in scalings.items()}
        yield
    finally:
        for layer, scalings in before.items():
            layer.scaling = scalings


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
