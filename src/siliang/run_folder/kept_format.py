"""Whether a run's frozen weights stay in the format of their file: 2 bytes a number where fp32 is loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from siliang.config import RunConfig
from siliang.hub import cached_file
from siliang.methods import Method
from siliang.models.folder import CONFIG, weight_files
from siliang.ops.stored import StoredWeight, is_large
from siliang.records import KeptWeights

FORMATS = {"BF16": torch.bfloat16, "F16": torch.float16}  # by the names of safetensors


def kept_format(config: RunConfig, method: Method, dtype: torch.dtype, device: str) -> torch.dtype | None:
    """The format in which the run keeps its base model's frozen matrices; None if all are converted.

    They are kept on a CPU where the run loads its weights in fp32, if the files have them in bf16 or fp16, unless full
    tuning trains them, or they are quantized, sharded or resized. BitFit's weights are loaded in fp32 also where it
    computes in bf16, and its matrices are kept there, too.

    Args:
        dtype: The format in which weights are loaded (`weight_dtype`).
    """
    if config.train.frozen_weights == "converted" or device != "cpu" or dtype is not torch.float32:
        return None
    if config.quantization is not None or config.data.add_tokens or method.config is None:
        return None
    if config.distributed.strategy in ("fsdp", "deepspeed"):
        return None
    return stored_format(config.model, config.revision)


def kept_weights(model: nn.Module) -> KeptWeights | None:
    """The weights of a loaded model that stay in the format of their file; None if there are none."""
    found = [p for p in model.parameters() if isinstance(p, StoredWeight)]
    if not found:
        return None
    return KeptWeights(
        format="bf16" if found[0].stored.dtype is torch.bfloat16 else "fp16",
        matrices=len(found),
        saved_bytes=sum(p.numel() * (p.dtype.itemsize - p.stored.dtype.itemsize) for p in found),
    )


def stored_format(name: str, revision: str | None = None) -> torch.dtype | None:
    """bf16 or fp16, if all large matrices of a model's files are in it; otherwise, or without local files, None."""
    folder = Path(name)
    if not folder.is_dir():
        found = cached_file(name, CONFIG, revision=revision)
        if found is None:
            return None
        folder = found.parent
    files = [file for file in weight_files(folder) if file and not file.endswith(".json")]
    formats: set[torch.dtype | None] = set()
    try:
        for file in files:
            if not file.endswith(".safetensors"):
                return None
            with safe_open(folder / file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118, it is no mapping
                    weight = weights.get_slice(key)
                    if is_large(weight.get_shape()):
                        formats.add(FORMATS.get(weight.get_dtype()))
    except (OSError, SafetensorError):  # loading says what is wrong
        return None
    return formats.pop() if len(formats) == 1 else None
