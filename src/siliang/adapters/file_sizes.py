"""What the files of an adapter hold: its config may need no more, or a small file could fill the memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from siliang.adapters.adapted_layer import AdaptedLayer
from siliang.adapters.training_state import TrainingState
from siliang.language import Bilingual, local
from siliang.methods import method_of
from siliang.methods.config import CONFIG_NAME, PeftConfig
from siliang.methods.layer import MakeAdapter
from siliang.methods.method import Parts
from siliang.types import AdapterError, first_line

SPARE_ELEMENTS = 2**25  # that an adapter may lack in its file: missing tensors are reported by name later


@dataclass(frozen=True)
class FileSizes:
    """How much the files of an adapter hold.

    Attributes:
        source: Their folder.
        elements: Of all tensors.
        largest: The most rows or columns of a tensor.
        training: Elements of what made a prompt; None where the files hold the prompt alone.
    """

    source: str
    elements: int
    largest: int
    training: int | None = None

    @classmethod
    def of(cls, folder: Path, tensors: dict[str, Tensor], training: TrainingState | None) -> FileSizes:
        """Of the tensors that were read from a folder."""
        return cls(
            str(folder),
            elements=sum(t.numel() for t in tensors.values()),
            largest=max((n for t in tensors.values() if t.numel() for n in t.shape), default=0),
            training=sum(t.numel() for t in training.prompt.values()) if training and training.prompt else None,
        )


def check_sizes(model: nn.Module, config: PeftConfig, parts: Parts, file: FileSizes) -> None:
    """Checks that an adapter needs no more than its files hold, before any of it is made.

    Raises:
        AdapterError: It needs more.
    """
    wanted: dict[str, int] = {}
    total = 0
    if parts.prompt is not None:
        wanted |= parts.prompt.sizes
        total += parts.prompt.elements
        made = parts.prompt.encoder_elements
        if file.training is not None and not config.inference_mode and made > file.training:
            raise AdapterError(
                Bilingual(
                    f"{file.source}: what made the prompt has {made:,} numbers by {CONFIG_NAME}, and "
                    f"{file.training:,} in the file.",
                    f"{file.source}：按 {CONFIG_NAME}，生成提示的部分有 {made:,} 个数，"
                    f"而文件中有 {file.training:,} 个。",
                )
            )
    spare, most = SPARE_ELEMENTS, sum(p.numel() for p in model.parameters())
    unsaved = sum(spec.elements for spec in parts.shared.values() if not spec.saved)
    if unsaved > most + spare:
        raise AdapterError(
            Bilingual(
                f"{file.source}: by {CONFIG_NAME} {' and '.join(parts.shared)} would have {unsaved:,} numbers that the "
                f"file leaves out, and the base model has {most:,}: was {CONFIG_NAME} changed?",
                f"{file.source}：按 {CONFIG_NAME}，{'、'.join(parts.shared)} 有 {unsaved:,} 个数不在文件中，"
                f"而基座模型只有 {most:,} 个：{CONFIG_NAME} 是否被改过？",
            )
        )
    shared = {name: torch.empty(spec.shape, device="meta") for name, spec in parts.shared.items()}
    for path, make in parts.layers.items():
        for key, shape in _shapes(model.get_submodule(path), make, shared, file.source, path).items():
            wanted[f"{path}.{key}"] = max(shape, default=0)
            total += math.prod(shape)
    for path, rows in parts.table_rows.items():
        wanted[f"{path}.{rows.key}"] = len(rows.indices)
        total += len(rows.indices) * model.get_parameter(f"{path}.weight").shape[1]
    for name, spec in parts.shared.items():
        if spec.saved:
            wanted[name] = max(spec.shape, default=0)
            total += spec.elements
    for name, value in wanted.items():
        if value > file.largest:
            raise AdapterError(
                Bilingual(
                    f"{file.source}: {name} would have {value:,} rows or columns by {CONFIG_NAME}, and the "
                    "largest tensor "
                    f"of the file has {file.largest:,}.",
                    f"{file.source}：按 {CONFIG_NAME}，{name} 应有 {value:,} 行或列，而文件中最大的张量只有 "
                    f"{file.largest:,}。",
                )
            )
    total += sum(model.get_parameter(path).numel() for path in parts.parameters)
    total += sum(t.numel() for path in parts.modules for t in model.get_submodule(path).state_dict().values())
    if method_of(config).has_smaller_files:
        spare += most
    if total > file.elements + spare:
        raise AdapterError(
            Bilingual(
                f"{file.source}: by {CONFIG_NAME} it has {total:,} numbers on this model, and in its file "
                f"{file.elements:,}: is it an adapter of another base model, or was {CONFIG_NAME} changed?",
                f"{file.source}：按 {CONFIG_NAME}，它在这个模型上有 {total:,} 个数，"
                f"而文件中有 {file.elements:,} 个：是别的基座模型的适配器，还是 {CONFIG_NAME} 被改过？",
            )
        )


def _shapes(
    base_layer: nn.Module, make: MakeAdapter, shared: Mapping[str, Tensor], source: str, path: str
) -> dict[str, torch.Size]:
    """The shapes of an adapter's tensors on a layer, from one that is made on the meta device.

    Raises:
        AdapterError: Its numbers are too many to be counted.
    """
    try:
        with torch.device("meta"):
            adapter = make(AdaptedLayer(_on_meta(base_layer)), "default", shared)
    except RuntimeError as error:
        raise AdapterError(
            Bilingual(
                f"{source}: by {CONFIG_NAME} {path} is too large: {first_line(error)}",
                f"{source}：按 {CONFIG_NAME}，{path} 过大：{local(first_line(error), 'zh')}",
            )
        ) from None
    return {key: t.shape for key, t in adapter.tensors().items()}


def _on_meta(module: nn.Module) -> nn.Module:
    """A module of the same kind and attributes whose tensors have shapes and no data."""
    twin = copy.copy(module)
    twin._parameters = {name: None if p is None else _empty(p) for name, p in module._parameters.items()}
    twin._buffers = {name: None if b is None else _empty(b) for name, b in module._buffers.items()}
    twin._modules = {name: None if child is None else _on_meta(child) for name, child in module._modules.items()}
    return twin


def _empty(t: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty(t.shape, dtype=t.dtype, device="meta"), requires_grad=False)
