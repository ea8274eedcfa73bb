"""A cache for the base model: it is loaded once and used by one run after another, as long as it is unchanged."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from siliang.config import RunConfig
from siliang.hardware import find_device
from siliang.memory.free import free_memory
from siliang.memory.peak import PeakMemory
from siliang.models.invented import invented_modules
from siliang.ops.stored import as_kept
from siliang.peft_api.model import PeftModel
from siliang.run_folder import load_base
from siliang.tasks import task_of

CHUNK = 2**18  # integers per partial sum: their products, 2 MB, fit the CPU cache
MULTIPLIER = 0x9E3779B97F4A7C15  # odd; the sum is multiplied by it before each chunk is added


class CachedBase:
    """Loads base models as `load_base` does, and caches the last one.

    A run gets the same model, bit for bit, as from `load_base`. A model that has changed, such as after full
    fine-tuning, is not cached. A model with a new head is loaded again for another seed, because the seed initializes
    the head.

    Attributes:
        loads: How many times a model was read from its files.
        loading_bytes: The peak memory of the process while it loaded the cached model.
    """

    def __init__(self) -> None:
        self.loads = self.loading_bytes = 0
        self._model: nn.Module | None = None
        self._key: tuple[object, ...] = ()
        self._checksums: dict[str, int] = {}

    def __call__(
        self,
        config: RunConfig,
        labels: list[str] | None,
        tokenizer: Any,
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
        kept: torch.dtype | None = None,
    ) -> Any:
        """Returns the base model for a run. After the run, `store` caches it again."""
        key = _key(config, labels, dtype, kept)
        model, self._model = self._model, None  # a run that fails does not store it again
        if model is not None and key == self._key:
            return model
        del model
        free_memory()
        with PeakMemory(device or find_device()) as memory:
            fresh = load_base(config, labels, tokenizer, dtype=dtype, device=device, kept=kept)
        self.loading_bytes = memory.peak_bytes
        self.loads += 1
        self._key, self._checksums = key, checksums(fresh)
        return fresh

    def store(self, model: nn.Module, config: RunConfig) -> None:
        """Detaches the adapter from the model of a finished run, and caches the base model if no bit has changed."""
        # added embedding rows are initialized from the global random generator, so they differ between runs
        if isinstance(model, PeftModel) and not config.data.add_tokens:
            base = model.unload().eval()
            for p in base.parameters():
                p.grad = None
            # weights missing from the checkpoint are initialized from the seed, which is not in the key
            has_new_weights = not task_of(config).model.heads and bool(invented_modules(base))
            if checksums(base) == self._checksums and not has_new_weights:
                self._model = base

    def drop(self) -> None:
        """Empties the cache."""
        self._model = None
        free_memory()


def checksums(model: nn.Module) -> dict[str, int]:
    """A checksum of each parameter and buffer, by name. It covers the bits and their order."""
    return {name: _checksum(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _checksum(tensor: torch.Tensor) -> int:
    """A weighted sum of the tensor's bits as integers, modulo 2^64, computed on the tensor's device.

    Every weight is odd, so a change of one integer always changes the sum. The weights are random, so a change of
    several integers, such as another order, goes undetected with a probability of at most 2^-32.
    """
    tensor = as_kept(tensor)
    if not tensor.numel():
        return 0
    size = tensor.element_size()
    flat = tensor.detach().as_subclass(torch.Tensor).contiguous().flatten()
    # 8 bytes at a time if the alignment allows it: fewer products
    wide = tensor.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0
    ints = flat.view(torch.int64 if wide else {1: torch.uint8, 2: torch.int16, 4: torch.int32}[size])
    weights, total = _weights(ints.device), 0
    for part in ints.split(CHUNK):
        part = part.long()
        # a product carries bits upwards only: mix the upper half, with signs and exponents, into the lower one
        part = part ^ ((part >> 32) & 0xFFFFFFFF)
        total = (total * MULTIPLIER + int((part * weights[: len(part)]).sum())) % 2**64
    return total


@cache
def _weights(device: torch.device) -> torch.Tensor:
    """Odd random int64 weights (CHUNK,), the same in every process."""
    generator = torch.Generator().manual_seed(0)  # a run uses the global generator
    return (torch.randint(-(2**62), 2**62, (CHUNK,), generator=generator) * 2 + 1).to(device)


def _key(
    config: RunConfig, labels: list[str] | None, dtype: torch.dtype, kept: torch.dtype | None
) -> tuple[object, ...]:
    quantized = config.quantization.model_dump_json() if config.quantization else None
    model = task_of(config).model
    # the seed of the run initializes a new head
    seed = config.train.seed if model.heads else None
    names = tuple(labels) if labels is not None else None
    return (
        config.model,
        config.revision,
        model,
        names,
        quantized,
        tuple(config.data.add_tokens),
        dtype,
        kept,
        seed,
    )
