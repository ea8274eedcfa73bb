"""The functions of Hugging Face PEFT, under their names."""

from __future__ import annotations

from typing import Literal, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from siliang.adapters.files import load_tensors
from siliang.methods.config import PeftConfig, config_class
from siliang.models.checkpointing import enable_checkpointing
from siliang.peft_api.model import PeftModel

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
