"""Counts the bytes of live tensors while something runs, on real tensors or on fake ones: how many at the peak, and
what they were.

The tracker sees every operator's result, and with it the storage of the result; a storage is alive until its last
tensor is gone. So it counts what a program holds at each moment. What a kernel allocates and frees before it returns is
not seen; what matters of that, on CPUs, is added (`_kernel_workspace`). What a storage is may become known late (a
result turns out to be saved for the backward pass, or to be a gradient), so the peak is divided into categories when it
is over.

torch has a tracker of the same design, torch.distributed._tools.mem_tracker; docs/log.md says why it is not used.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from siliang.ops.place import kind_of
from siliang.records import CATEGORIES, Category

DEVICE = torch.ops.prim.device.default
SAFE_SOFTMAX = torch.ops.aten._safe_softmax
ARITHMETIC = {getattr(torch.ops.aten, name + end) for name in ("add", "sub", "mul", "div") for end in ("", "_")}
KERNELS = {SAFE_SOFTMAX, *ARITHMETIC}
CUDA_BLOCK_BYTES = 512  # the CUDA allocator rounds up to it


@dataclass
class TrackedStorage:
    """A storage.

    Attributes:
        born: Moments at which it came and went; None while it is there.
        what: The operator that made it, and the shape it had.
    """

    nbytes: int
    category: Category
    layer: int | None
    born: int
    what: tuple[str, tuple[int, ...]]
    gone: int | None = None
    ref: Any = None


@dataclass(frozen=True)
class Peak:
    """The moment at which the most was alive.

    Attributes:
        nbytes: Of all live storages together.
        parts: Of each category; they add up to `nbytes`.
        layers: Activations of each layer.
        largest: The largest tensors of that moment: bytes, category, operator, shape.
    """

    nbytes: int
    parts: dict[Category, int]
    layers: tuple[int, ...] = ()
    largest: tuple[tuple[int, Category, str, tuple[int, ...]], ...] = ()


@dataclass
class Tracker(TorchDispatchMode):
    """Counts within `with`.

    Attributes:
        block_bytes: A storage counts as the next multiple of it: CUDA_BLOCK_BYTES, or 1.
        vocabulary: Width of the logits.
        live_bytes: At this moment.
        peak_bytes: At the worst one so far.
        counting: Count the products too.
        flops: Of those so far.
        layer_flops: Of those, what the layers' forward passes took.
        boundary_bytes: Of a layer's input, which it keeps where it recomputes.
    """

    block_bytes: int = 1
    vocabulary: int | None = None
    live_bytes: int = 0
    peak_bytes: int = 0
    counting: bool = False
    flops: int = 0
    layer_flops: int = 0
    boundary_bytes: int = 0
    _moment: int = 0
    _peak_moment: int = 0
    _layer: int | None = None
    _layers: int = 0
    _alive: dict[int, TrackedStorage] = field(default_factory=dict)
    _all: list[TrackedStorage] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __hash__(self) -> int:
        return id(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for twice as often as anything is computed
        out = func(*args, **(kwargs or {}))
        if self.counting and (count := flop_registry.get(func.overloadpacket)) is not None:
            flops = count(*args, **(kwargs or {}), out_val=out)
            self.flops += flops
            self.layer_flops += flops if self._layer is not None else 0
        for x in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(x, Tensor):
                self._see(x, func)
        if func.overloadpacket in KERNELS and kind_of(out) == "cpu":
            self._pass(_kernel_workspace(func.overloadpacket, args, out), func)
        return out

    def hold(self, tensors: Iterable[Tensor], category: Category) -> None:
        """Says what these are, whether they have been seen or not."""
        for x in tensors:
            held = self._see(x, None)
            held.category = category

    @contextmanager
    def watching(self, model: nn.Module, layers: list[nn.Module]) -> Iterator[None]:
        """Within the block, the model's tensors and those of its training steps are told apart.

        Args:
            layers: Those of its stack, to which activations are counted.
        """
        self._layers = len(layers)
        for p in model.parameters():
            self.hold([p], "trained" if p.requires_grad else "weights")
        self.hold(model.buffers(), "weights")
        handles = [
            p.register_post_accumulate_grad_hook(self._accumulated) for p in model.parameters() if p.requires_grad
        ]
        for i, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(partial(self._enter, i)))
            handles.append(layer.register_forward_hook(self._leave))
        handles.append(model.register_forward_pre_hook(self._gathered))
        sharded = isinstance(model, FSDPModule)
        try:
            resizes = on_storage_resize(self._resized) if sharded else nullcontext()
            with saved_tensors_hooks(self._saved, lambda x: x), self, resizes:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def restart(self) -> None:
        """Forgets the peak, and begins again with what is alive."""
        self._all = list(self._alive.values())
        self.peak_bytes, self._peak_moment = self.live_bytes, self._moment

    def peak(self, largest: int = 8) -> Peak:
        """The worst moment since the last `restart`, with the largest so many tensors of it."""
        there = [h for h in self._all if h.born <= self._peak_moment and (h.gone is None or h.gone > self._peak_moment)]
        parts: Counter[Category] = Counter(dict.fromkeys(CATEGORIES, 0))
        layers = [0] * self._layers
        for held in there:
            parts[held.category] += held.nbytes
            if held.layer is not None and held.category == "activations":
                layers[held.layer] += held.nbytes
        there.sort(key=lambda held: -held.nbytes)
        return Peak(
            self.peak_bytes,
            dict(parts),
            tuple(layers),
            tuple((h.nbytes, h.category, *h.what) for h in there[:largest]),
        )

    def _see(self, x: Tensor, func: Any) -> TrackedStorage:
        if isinstance(x, DTensor):
            x = x._local_tensor
        storage = x.untyped_storage()
        key = storage._cdata
        if (held := self._alive.get(key)) is not None:
            return held
        self._moment += 1
        nbytes = self._rounded(storage)
        wide = self.vocabulary is not None and x.dim() > 1 and x.shape[-1] == self.vocabulary
        held = TrackedStorage(
            nbytes, "logits" if wide else "workspace", self._layer, self._moment, (str(func or ""), tuple(x.shape))
        )
        held.ref = weakref.ref(storage, partial(self._lost, key))
        self._take(key, held)
        return held

    def _rounded(self, storage: Any) -> int:
        return -(-storage.nbytes() // self.block_bytes) * self.block_bytes

    def _take(self, key: int, held: TrackedStorage) -> None:
        self._alive[key] = held
        self._all.append(held)
        self.live_bytes += held.nbytes
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self._peak_moment = self.live_bytes, self._moment

    def _pass(self, nbytes: int, func: Any) -> None:
        """Counts what one operator allocates and frees."""
        if self.live_bytes + nbytes > self.peak_bytes:
            self._moment += 1
            held = TrackedStorage(nbytes, "workspace", self._layer, self._moment, (str(func), ()), self._moment + 1)
            self._all.append(held)
            self.peak_bytes, self._peak_moment = self.live_bytes + nbytes, self._moment
            self._moment += 1

    def _resized(self, storage: Any) -> None:
        held = self._alive.get(key := storage._cdata)
        if held is not None and (nbytes := self._rounded(storage)) != held.nbytes:
            self._moment += 1
            held.gone = self._moment
            self.live_bytes -= held.nbytes
            self._take(key, replace(held, nbytes=nbytes, born=self._moment, gone=None))

    def _lost(self, key: int, ref: Any) -> None:
        held = self._alive.pop(key)
        self._moment += 1
        held.gone = self._moment
        self.live_bytes -= held.nbytes

    def _saved(self, x: Tensor) -> Tensor:
        held = self._see(x, None)
        if held.category == "workspace":
            held.category = "activations"
        return x

    def _accumulated(self, p: Tensor) -> None:
        if p.grad is not None:
            self.hold([p.grad], "gradients")

    def _enter(self, i: int, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._layer = i
        self._gathered(layer, args)
        # kept by a layer that recomputes, which hides it from autograd
        for x in args:
            if isinstance(x, Tensor) and (held := self._see(x, None)).category in ("workspace", "activations"):
                held.category, self.boundary_bytes = "activations", held.nbytes

    def _gathered(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A layer whose weights are sharded has just gathered them."""
        for p in module.parameters():
            if (held := self._see(p, None)).category == "workspace":
                held.category = "weights"

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._layer = None


@contextmanager
def on_storage_resize(then: Callable[[Any], None]) -> Iterator[None]:
    """Within the block `then` is called with each storage that is resized, in the whole process.

    Resizing is not an operator, and FSDP frees and allocates a layer's weights with it: only here can it be seen.
    """
    resize: Any = torch.UntypedStorage.resize_

    def resized(storage: Any, size: int) -> None:
        resize(storage, size)
        then(storage)

    torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize


def _kernel_workspace(packet: Any, args: tuple[Any, ...], out: Tensor) -> int:
    """Bytes of what an operator holds besides its arguments and its result, on a CPU."""
    if isinstance(out, DTensor):  # not this process's share
        return 0
    if packet is SAFE_SOFTMAX:
        return out.numel()  # which scores are minus infinity
    operands = [x for x in args[:2] if isinstance(x, Tensor) and x.dim()]
    if len({x.dtype for x in operands}) < 2:
        return 0
    common = torch.result_type(*operands)
    return sum(x.numel() * common.itemsize for x in operands if x.dtype != common)  # a copy in the format of both
