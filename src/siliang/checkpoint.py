"""adapter_config.json and adapter_model.safetensors, in and out; the contract is PEFT's format."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from siliang.files import replacing
from siliang.inject import PROMPT_KEY, Injection
from siliang.methods.base import CONFIG_NAME, PeftConfig, Prompt, WrappedLayer
from siliang.methods.lora import LoraConfig
from siliang.methods.prefix_tuning import PrefixTuningConfig
from siliang.targets import find_targets, layer_arguments
from siliang.types import AdapterError, TargetError

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
TRAINING_NAME = "siliang_training.safetensors"
MOST_ENCODER_UNITS = 32_768  # of the small network of a P-tuning prompt, which a file need not hold


def save_adapter(folder: Path, injection: Injection, name: str, config: PeftConfig) -> None:
    """Writes adapter `name` into `folder`: each file under a temporary name first, the config last.

    A folder with adapter_config.json in it is therefore complete. What PEFT flattens away, the encoder of a P-tuning
    prompt or the projection of a prefix, goes into a file of its own, which PEFT does not look at.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompt = injection.prompts[name] if name in injection.prompts else None  # noqa: SIM401, ModuleDict has no get
    encoder = {} if prompt is None or prompt.flat else prompt.state_dict()
    for file, tensors in ((TRAINING_NAME, encoder), (WEIGHTS_NAME, injection.adapter_tensors(name))):
        if tensors:
            with replacing(folder / file) as temporary:
                plain = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
                save_file(plain, temporary, metadata={"format": "pt"})
        else:
            (folder / file).unlink(missing_ok=True)
    with replacing(folder / CONFIG_NAME) as temporary:
        temporary.write_text(config.to_json(inference_mode=True), encoding="utf-8")  # as PEFT does


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, on the CPU. A pickled `.bin` is read without running code.

    Raises:
        AdapterError: No weights are there, or they are damaged.
    """
    path, pickled = folder / WEIGHTS_NAME, folder / PICKLED_NAME
    try:
        if path.is_file():
            return load_file(path)
        if pickled.is_file():
            return torch.load(pickled, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        first_line = str(error).partition("\n")[0]
        raise AdapterError(f"{folder}: the adapter's weights are damaged: {first_line}") from error
    raise AdapterError(f"{folder} holds no adapter weights: {WEIGHTS_NAME} is missing there.")


def read_training(folder: Path) -> dict[str, Tensor] | None:
    """What made the prompt of an adapter folder, on the CPU; None where there is nothing more than the prompt.

    Raises:
        AdapterError: The file is damaged.
    """
    path = folder / TRAINING_NAME
    if not path.is_file():
        return None
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged: {error}") from error


def check_sizes(config: PeftConfig, tensors: dict[str, Tensor], *, model: nn.Module, source: str) -> None:
    """Before anything is made by a config: what it asks for must be in the file, or a small file could fill the memory.

    Raises:
        AdapterError: It asks for more.
    """
    largest = max((n for t in tensors.values() for n in t.shape), default=0)
    wanted = {n: getattr(config, n, None) for n in ("num_virtual_tokens", "token_dim", "num_layers")}
    if isinstance(config, PrefixTuningConfig):
        wanted["num_layers times token_dim"] = (config.num_layers or 0) * (config.token_dim or 0)
    if isinstance(config, LoraConfig):
        # of the layers alone: with rank_pattern, r may be that of none of them
        with suppress(TargetError):  # attaching will say so
            layers = find_targets(model, copy.deepcopy(config), outside=[], lenient=True)
            ranks = {path: values["r"] for path, values in layer_arguments(config, layers, lenient=True).items()}
            wanted |= {f"{path}: r": rank for path, rank in ranks.items()}
    for name, value in wanted.items():
        if value is not None and value > largest:
            raise AdapterError(f"{source}: {name} = {value:,}, and the largest tensor has {largest:,} rows or columns.")
    for name in ("encoder_hidden_size", "encoder_num_layers"):
        if (getattr(config, name, None) or 0) > MOST_ENCODER_UNITS:
            raise AdapterError(f"{source}: {name} = {getattr(config, name):,} is more than {MOST_ENCODER_UNITS:,}.")


@torch.no_grad()
def load_tensors(
    injection: Injection,
    name: str,
    tensors: dict[str, Tensor],
    *,
    source: str,
    training: dict[str, Tensor] | None = None,
) -> None:
    """Copies `tensors` into adapter `name`; nothing is copied unless all of it fits.

    Args:
        training: What makes the prompt, from `read_training`: without it the prompt becomes a plain table.

    Raises:
        AdapterError: Keys are missing or unexpected, or a shape differs.
    """
    own = injection.adapter_tensors(name)
    # PEFT with bias="all" writes a saved module's bias more than once: under the wrapper's name, and as it was before
    twice = {k for k in tensors if ".modules_to_save." in k and k.replace(".modules_to_save.", ".") in tensors}
    twice |= {k for k in tensors if k.replace(".original_module.", ".") in own.keys() - {k}}
    tensors = {k: t for k, t in tensors.items() if k not in twice}
    embeddings = _embeddings_along(injection, tensors.keys() - own.keys())
    if missing := sorted(own.keys() - tensors.keys()):
        raise AdapterError(f"{source}: {len(missing)} of {len(own)} tensors are missing, the first is {missing[0]}.")
    if unexpected := sorted(tensors.keys() - own.keys() - embeddings.keys()):
        raise AdapterError(
            f"{source}: {len(unexpected)} tensors have no place in the model, the first is {unexpected[0]}."
        )
    needed = {k: t.shape for k, t in own.items()}
    needed |= {k: injection.model.get_parameter(path).shape for k, path in embeddings.items()}
    for key, shape in needed.items():
        if shape != tensors[key].shape:
            raise AdapterError(
                f"{source}: {key} has shape {tuple(tensors[key].shape)}, the model needs {tuple(shape)}. "
                "Is it an adapter of another base model?"
            )
    for key, tensor in own.items():
        if key == PROMPT_KEY:
            _load_prompt(injection.prompts[name], tensors[key], training, source)
        else:
            tensor.copy_(tensors[key])
    for key, path in embeddings.items():
        if not torch.equal(injection.model.get_parameter(path).cpu(), tensors[key].cpu()):
            injection.stand_in(path, name, tensors[key].to(injection.model.get_parameter(path)))


def _embeddings_along(injection: Injection, keys: Iterable[str]) -> dict[str, str]:
    """Those of `keys` that are the base model's embeddings, which PEFT saves along when they are tuned or were resized,
    with the path where each stands.
    """
    ends = (getattr(injection.model, f"get_{end}_embeddings", None) for end in ("input", "output"))
    modules = {id(module) for end in ends if end is not None and (module := end()) is not None}
    paths = set()
    for path, module in injection.model.named_modules():
        if path and id(module) in modules:
            wrapped = isinstance(module, WrappedLayer)
            holder: Any = module.base_layer if wrapped else module
            if "weight" in dict(holder.named_parameters(recurse=False)):  # a saved copy has none of its own
                paths.add(f"{path}.base_layer.weight" if wrapped else f"{path}.weight")
    return {key: path for key in keys if (path := key.removeprefix(injection.key_prefix)) in paths}


def _load_prompt(prompt: Prompt, table: Tensor, training: dict[str, Tensor] | None, source: str) -> None:
    if training is None or prompt.flat:
        prompt.flatten(table)
        return
    try:
        prompt.load_state_dict(training)
    except RuntimeError as error:
        raise AdapterError(f"{source}: {TRAINING_NAME} does not fit: {str(error).splitlines()[-1].strip()}") from error
