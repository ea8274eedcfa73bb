"""What the files of an adapter hold: its config may ask for no more, or a small file could fill the memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from siliang.methods.config import CONFIG_NAME, PeftConfig
from siliang.methods.method import Parts
from siliang.types import AdapterError

SPARE_NUMBERS = 2**25  # that an adapter may lack in its file: what is missing by name is said of tensors, one by one


@dataclass(frozen=True)
class FileSizes:
    """How much the files of an adapter hold.

    Attributes:
        source: Their folder.
        numbers: Of all tensors.
        largest: The most rows or columns of a tensor.
        training: The numbers of what made a prompt; None where nothing more than the prompt is there.
    """

    source: str
    numbers: int
    largest: int
    training: int | None = None

    @classmethod
    def of(cls, folder: Path, tensors: dict[str, Tensor], training: dict[str, Tensor] | None) -> FileSizes:
        """Of the tensors that were read from a folder."""
        return cls(
            str(folder),
            numbers=sum(t.numel() for t in tensors.values()),
            largest=max((n for t in tensors.values() if t.numel() for n in t.shape), default=0),
            training=None if training is None else sum(t.numel() for t in training.values()),
        )


def check_sizes(model: nn.Module, config: PeftConfig, parts: Parts, file: FileSizes) -> None:
    """Whether all that an adapter asks for can be in its files. Asked before any of it is made.

    Raises:
        AdapterError: It asks for more.
    """
    wanted: dict[str, int] = {}
    total = 0
    if parts.prompt is not None:
        wanted |= parts.prompt.sizes
        total += parts.prompt.numbers
        made = parts.prompt.encoder_numbers
        if file.training is not None and not config.inference_mode and made > file.training:
            raise AdapterError(
                f"{file.source}: what made the prompt has {made:,} numbers by {CONFIG_NAME}, and "
                f"{file.training:,} in the file."
            )
    for path, spec in parts.layers.items():
        layer = model.get_submodule(path)
        wanted |= {f"{path}: {field}": size for field, size in spec.sizes(layer).items()}
        total += spec.numbers(layer)
    for name, shared in parts.shared.items():
        if shared.saved:
            wanted[name] = max(shared.shape, default=0)
            total += shared.numbers
    for name, value in wanted.items():
        if value > file.largest:
            raise AdapterError(
                f"{file.source}: {name} = {value:,}, and the largest tensor has {file.largest:,} rows or columns."
            )
    total += sum(model.get_parameter(path).numel() for path in parts.parameters)
    total += sum(t.numel() for path in parts.modules for t in model.get_submodule(path).state_dict().values())
    if total > file.numbers + SPARE_NUMBERS:
        raise AdapterError(
            f"{file.source}: by {CONFIG_NAME} it has {total:,} numbers on this model, and in its file "
            f"{file.numbers:,}: is it an adapter of another base model, or was {CONFIG_NAME} changed?"
        )
