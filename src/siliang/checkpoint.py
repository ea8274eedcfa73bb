"""adapter_config.json and adapter_model.safetensors, in and out; the contract is PEFT's format."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from siliang.methods.base import CONFIG_NAME, LayerConfig
from siliang.types import AdapterError

if TYPE_CHECKING:
    from siliang.inject import Injection

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"


def save_adapter(folder: Path, injection: Injection, name: str, config: LayerConfig) -> None:
    """Writes adapter `name` into `folder`: each file under a temporary name first, the config last.

    A folder with adapter_config.json in it is therefore complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: t.detach().cpu().contiguous() for key, t in injection.adapter_tensors(name).items()}
    with replacing(folder / WEIGHTS_NAME) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    with replacing(folder / CONFIG_NAME) as temporary:
        temporary.write_text(config.to_json(), encoding="utf-8")


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


@torch.no_grad()
def load_tensors(injection: Injection, name: str, tensors: dict[str, Tensor], *, source: str) -> None:
    """Copies `tensors` into adapter `name`; nothing is copied unless all of it fits.

    Raises:
        AdapterError: Keys are missing or unexpected, or a shape differs.
    """
    own = injection.adapter_tensors(name)
    # PEFT with bias="all" writes a saved module's bias more than once: under the wrapper's name, and as it was before
    twice = {k for k in tensors if ".modules_to_save." in k and k.replace(".modules_to_save.", ".") in tensors}
    twice |= {k for k in tensors if k.replace(".original_module.", ".") in own.keys() - {k}}
    tensors = {k: t for k, t in tensors.items() if k not in twice}
    if missing := sorted(own.keys() - tensors.keys()):
        raise AdapterError(f"{source}: {len(missing)} of {len(own)} tensors are missing, the first is {missing[0]}.")
    if unexpected := sorted(tensors.keys() - own.keys()):
        raise AdapterError(
            f"{source}: {len(unexpected)} tensors have no place in the model, the first is {unexpected[0]}."
        )
    for key, tensor in own.items():
        if tensor.shape != tensors[key].shape:
            raise AdapterError(
                f"{source}: {key} has shape {tuple(tensors[key].shape)}, the model needs {tuple(tensor.shape)}. "
                "Is it an adapter of another base model?"
            )
    for key, tensor in own.items():
        tensor.copy_(tensors[key])


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path` to write to; it becomes `path` only if the block succeeds."""
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
