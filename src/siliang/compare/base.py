"""The base model of many runs: loaded once, used by one run after another, and kept while it is unchanged."""

from __future__ import annotations

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
    """A checksum for each parameter and buffer, by name."""
    return {name: _sum(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _sum(tensor: torch.Tensor) -> int:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(whole).sum(dtype=torch.int64)) if tensor.numel() else 0


def _key(config: RunConfig, labels: list[str] | None, dtype: torch.dtype) -> tuple[object, ...]:
    quantized = config.quantization.model_dump_json() if config.quantization else None
    # a new head is drawn by the seed of the run
    seed = config.train.seed if TASKS[config.task].model.heads else None
    named = tuple(labels) if labels is not None else None
    return (config.model, config.revision, config.task, named, quantized, tuple(config.data.add_tokens), dtype, seed)
