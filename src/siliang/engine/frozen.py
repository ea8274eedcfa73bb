"""The cache of frozen layers' outputs. If only the top layers are trained, the hidden states below the first trained
layer are the same in every epoch: they are computed once and cached.

    epoch 1:      row -> layers 0 .. c-1 -> cache -> layers c .. L
    epoch 2 ...:                            cache -> layers c .. L

The cache is exact or off: nothing below layer c may be trained or random (dropout), and rows must have no padding.

Shapes: n tokens of a row, D hidden.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from siliang.data.cache import cache_folder
from siliang.engine.budget import MemoryBudget
from siliang.engine.patches import Undo, replace_forward
from siliang.engine.randomness import draws_on_fake, find_randomness
from siliang.engine.trial import ModelTrial, modes
from siliang.language import Bilingual, local
from siliang.models.introspect import backbone, named_arguments, parameters_of
from siliang.ops.graph import leaves_of
from siliang.ops.layout import Layout

DISK_SHARE = 0.25  # share of the free disk space
IN_MEMORY = ("tmpfs", "ramfs")  # file systems in memory


@dataclass(frozen=True)
class FrozenLayers:
    """The layers whose output is the same in each epoch.

    Attributes:
        count: The number of these lowest layers.
        why_not: Why there are none although layers are frozen; None otherwise.
    """

    count: int
    why_not: str | None = None


def find_frozen_layers(trial: ModelTrial, layers: list[nn.Module]) -> FrozenLayers:
    """The layers below the lowest trained one, if their output is deterministic and nothing before them is trained."""
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    first = min(trained.index(True) if any(trained) else len(layers), len(layers) - 1)
    if first == 0:
        return FrozenLayers(0)
    part = _Below(trial, layers[first])
    if not trial.comparing:
        return FrozenLayers(0 if draws_on_fake(part.run) or part.trained() else first)
    random_part = find_randomness(part.backbone, part.run, trial.device)
    if (below := part.trained()) is not None:
        return FrozenLayers(
            0, Bilingual(f"{below} is trained, below layer {first}", f"{below} 在第 {first} 层之下，而它要训练")
        )
    if random_part is not None:
        what, where = random_part
        return FrozenLayers(
            0,
            Bilingual(
                f"there is {what} below layer {first} ({where})",
                f"第 {first} 层之下有{local(what, 'zh')}（{where}）",
            ),
        )
    return FrozenLayers(first)


def frozen_cache(
    trial: ModelTrial, layers: list[nn.Module], budget: MemoryBudget, tokens: Callable[[], int] | None, *, noise: bool
) -> tuple[FrozenCache | None, FrozenLayers]:
    """The cache of the frozen layers' output, and these layers. On fake tensors there is no cache.

    Args:
        tokens: Returns the tokens of all rows to be cached.
        noise: Training adds noise to the embeddings.
    """
    frozen = find_frozen_layers(trial, layers)
    if frozen.count and noise:
        frozen = FrozenLayers(0, Bilingual("train.neftune_alpha adds noise", "train.neftune_alpha 会加入噪声"))
    if not frozen.count or not trial.comparing:
        return None, frozen
    store = StateStore.within(budget, tokens() if tokens else None)
    budget.promised = store.promised
    return FrozenCache(layers, frozen.count, store), frozen


class _Below:
    """A run of the trial's sequences in training mode, up to the layer `end`."""

    def __init__(self, trial: ModelTrial, end: nn.Module) -> None:
        self.trial, self.end, self.backbone = trial, end, backbone(trial.base)
        self._input: Tensor | None = None

    def run(self) -> None:
        """Runs it with gradients."""

        def stop(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            self._input = named_arguments(module, args, kwargs)[next(iter(parameters_of(module)))]
            raise StopForwardError

        inputs = self.trial.batch.inputs
        handle = self.end.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
        try:
            with modes(self.trial.base, training=True), torch.enable_grad(), suppress(StopForwardError):
                self.backbone(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        finally:
            handle.remove()

    def trained(self) -> str | None:
        """A trained parameter that the input of `end` depends on, by its path; None if there is none.

        Position embeddings, norms and projections before the layers have different names in each model, and so the
        parameters are those of the graph. A tensor of the graph that is no parameter is not trained: with gradient
        checkpointing, the embeddings' output may ask for a gradient.
        """
        x, self._input = self._input, None
        if x is None:
            return None
        names = {id(p): name for name, p in self.trial.base.named_parameters()}
        for leaf in leaves_of(x):
            if isinstance(leaf, nn.Parameter):
                return names.get(id(leaf), "a parameter")
        return None


@dataclass
class StateStore:
    """Hidden states by row: in memory up to a limit, then in a file that is removed with the process.

    Attributes:
        tokens: The tokens of all rows to be cached; None if not known.
        refused: Rows for which no space was left.
        folder: The folder of the file; None for the folder of temporary files.
    """

    memory_bytes: int
    disk_bytes: int
    tokens: int | None = None
    refused: int = 0
    folder: Path | None = None
    _held: dict[bytes, Tensor] = field(default_factory=dict)
    _places: dict[bytes, tuple[int, tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    _used: int = 0
    _token_bytes: float | None = None
    _written: int = 0
    _file: IO[bytes] | None = None

    @classmethod
    def within(cls, budget: MemoryBudget, tokens: int | None = None) -> StateStore:
        """A store with its share of the memory budget and of the free disk."""
        return cls(budget.for_cache(), free_disk_bytes(), tokens, folder=disk_folder())

    def promised(self) -> float:
        """The bytes of memory that further rows will need."""
        most: float = self.memory_bytes
        if self.tokens is not None and self._token_bytes is not None:
            most = min(most, self.tokens * self._token_bytes)
        return max(0.0, most - self._used)

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    def __contains__(self, key: bytes) -> bool:
        return key in self._held or key in self._places

    def __len__(self) -> int:
        return len(self._held) + len(self._places)

    def put(self, key: bytes, states_nD: Tensor) -> None:
        """Stores a row, if space is left."""
        if key in self:
            return
        states_nD = states_nD.detach().to("cpu", copy=True)
        self._token_bytes = states_nD.nbytes / max(len(states_nD), 1)
        if self._used + states_nD.nbytes <= self.memory_bytes:
            self._held[key] = states_nD
            self._used += states_nD.nbytes
        elif self._written + states_nD.nbytes <= self.disk_bytes:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - it lives as long as the store
            self._file.seek(self._written)
            self._file.write(states_nD.contiguous().view(torch.uint8).numpy().data)
            self._places[key] = (self._written, tuple(states_nD.shape), states_nD.dtype)
            self._written += states_nD.nbytes
        else:
            self.refused += 1

    def get(self, key: bytes) -> Tensor:
        """A stored row, (n, D)."""
        if key in self._held:
            return self._held[key]
        start, shape, dtype = self._places[key]
        count = int(np.prod(shape)) * dtype.itemsize
        assert self._file is not None
        self._file.seek(start)
        raw = torch.frombuffer(bytearray(self._file.read(count)), dtype=torch.uint8)
        return raw.view(dtype).view(shape)


def free_disk_bytes() -> int:
    """The bytes of disk that the cache may use."""
    folder = disk_folder()
    return int(DISK_SHARE * psutil.disk_usage(str(folder)).free) if folder else 0


def disk_folder() -> Path | None:
    """A folder for temporary files on a disk; None if there is none. The default folder is often in memory."""
    for folder in (Path(tempfile.gettempdir()), cache_folder()):
        parts = [part for part in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(part.mountpoint)]
        kind = max(parts, key=lambda part: len(part.mountpoint)).fstype if parts else ""
        if kind not in IN_MEMORY:
            return folder
    return None


class StopForwardError(Exception):
    """Stops a forward pass: its rows are in the cache, and the rest is not needed."""


class FrozenCache:
    """Caches the output of the lowest layers.

    Attributes:
        count: The number of these layers; layer `count` reads from the cache.
        only_fill: Only fill the cache: the forward pass then ends with a StopForwardError.
        hits: Batches whose lowest layers were not computed.
    """

    def __init__(self, layers: list[nn.Module], count: int, store: StateStore) -> None:
        self.layers, self.count, self.store = layers, count, store
        self.only_fill = False
        self.hits = 0
        self._keys: tuple[bytes, ...] | None = None
        self._tuples: bool | None = None
        self._skipping = False  # the lowest layers are not computed

    @contextmanager
    def batch(self, keys: tuple[bytes, ...]) -> Iterator[None]:
        """Within the block, backward included, a batch of these rows goes through the model."""
        self._keys, undo = keys, list[Undo]()
        if self._tuples is not None and all(key in self.store for key in keys):
            self.hits += 1
            undo = [replace_forward(layer, self._skip) for layer in self.layers[: self.count]]
            self._skipping = True
        try:
            yield
        finally:
            self._keys, self._skipping = None, False
            for restore in undo:
                restore()

    def exchange(self, hidden_1TD: Tensor, layout: Layout) -> Tensor:
        """The input of layer `count`: the cached states, or the computed ones, which are cached now."""
        if self._keys is None:
            return hidden_1TD
        if self._skipping:
            states = layout.join([self.store.get(key) for key in self._keys])
            return states.to(hidden_1TD.device, non_blocking=True)
        for key, states_nD in zip(self._keys, layout.by_sequence(hidden_1TD), strict=True):
            self.store.put(key, states_nD)
        if self.only_fill:
            raise StopForwardError
        return hidden_1TD

    def note_output(self, output: object) -> None:
        """Records the type of a computed layer's output: a skipped layer must return the same type."""
        self._tuples = isinstance(output, tuple)

    def _skip(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor | tuple[Tensor, None]:
        return (hidden, None) if self._tuples else hidden
