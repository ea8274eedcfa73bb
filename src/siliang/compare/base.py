"""The base model of many runs: loaded once, used by one run after another, and kept while it is unchanged."""

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
from siliang.peft_api.model import PeftModel
from siliang.run_folder import load_base
from siliang.tasks import TASKS

CHUNK = 2**18  # integers of one sum: their products, 2 MB, stay in the cache
ODD = 0x9E3779B97F4A7C15  # what a chunk's sum is multiplied by for each chunk that follows


class KeptBase:
    """Returns base models as `load_base` does, and keeps the one that is given back.

    A run gets the same model, bit for bit, as if it had loaded it itself. A model that has changed, such as a
    fully tuned one, is not kept. One with a new head is loaded again for another seed, which draws another head.

    Attributes:
        loads: How often a model was read from its files.
        loading_bytes: The peak memory of the process while it loaded the present model.
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
    ) -> Any:
        """The base model for a run, which gives it back with `take_back`."""
        key = _key(config, labels, dtype)
        model, self._model = self._model, None  # a run that fails does not bring it back
        if model is not None and key == self._key:
            return model
        del model
        free_memory()
        with PeakMemory(device or find_device()) as memory:
            fresh = load_base(config, labels, tokenizer, dtype=dtype, device=device)
        self.loading_bytes = memory.peak_bytes
        self.loads += 1
        self._key, self._checksums = key, checksums(fresh)
        return fresh

    def take_back(self, model: nn.Module, config: RunConfig) -> None:
        """Takes a run's model back, detaches the adapter, and keeps the base if no bit of it has changed."""
        # rows added to embeddings were drawn from the global random numbers, as a run of its own would draw them
        if isinstance(model, PeftModel) and not config.data.add_tokens:
            base = model.unload().eval()
            for p in base.parameters():
                p.grad = None
            # weights that the checkpoint lacks are drawn by the seed, which is not in the key
            has_new_weights = not TASKS[config.task].model.heads and bool(invented_modules(base))
            if checksums(base) == self._checksums and not has_new_weights:
                self._model = base

    def drop(self) -> None:
        """Frees the model."""
        self._model = None
        free_memory()


def checksums(model: nn.Module) -> dict[str, int]:
    """A checksum for each parameter and buffer, by name: of its bits and their order."""
    return {name: _checksum(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _checksum(tensor: torch.Tensor) -> int:
    """A weighted sum of the tensor's bits, as integers, modulo 2^64, computed where the tensor is.

    Every weight is odd, so one changed integer always changes the sum; the weights are random, so a change of several,
    such as another order, leaves it the same with a probability of 2^-32 or less.
    """
    if not tensor.numel():
        return 0
    size = tensor.element_size()
    flat = tensor.detach().as_subclass(torch.Tensor).contiguous().flatten()
    # 8 bytes at a time where they can be: fewer products
    wide = tensor.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0
    ints = flat.view(torch.int64 if wide else {1: torch.uint8, 2: torch.int16, 4: torch.int32}[size])
    weights, total = _weights(ints.device), 0
    for part in ints.split(CHUNK):
        part = part.long()
        # a product takes no bit downwards: the upper half, which holds signs and exponents, is mixed into the lower one
        part = part ^ ((part >> 32) & 0xFFFFFFFF)
        total = (total * ODD + int((part * weights[: len(part)]).sum())) % 2**64
    return total


@cache
def _weights(device: torch.device) -> torch.Tensor:
    """Odd random int64 weights (CHUNK,), always the same."""
    generator = torch.Generator().manual_seed(0)  # not the global one, from which a run draws
    return (torch.randint(-(2**62), 2**62, (CHUNK,), generator=generator) * 2 + 1).to(device)


def _key(config: RunConfig, labels: list[str] | None, dtype: torch.dtype) -> tuple[object, ...]:
    quantized = config.quantization.model_dump_json() if config.quantization else None
    # a new head is drawn by the seed of the run
    seed = config.train.seed if TASKS[config.task].model.heads else None
    named = tuple(labels) if labels is not None else None
    return (config.model, config.revision, config.task, named, quantized, tuple(config.data.add_tokens), dtype, seed)
