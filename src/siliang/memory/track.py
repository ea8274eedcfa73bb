"""Counts the bytes of live tensors, real or fake, while something runs: how many at the peak, and of what category.

The tracker sees every operator's result, and with it the storage of the result. A storage is alive until its last
tensor is gone, so the tracker knows what a program holds at each moment. It does not see what a kernel allocates and
frees before it returns; the part of that which matters on CPUs is added (`_kernel_workspace`). The category of a
storage may become known late: a result turns out to be saved for the backward pass, or to be a gradient. So the peak is
divided into categories at the end.

torch has a tracker of the same design, torch.distributed._tools.mem_tracker; docs/log.md says why it is not used.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, UntypedStorage, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from siliang.ops.place import kind_of
from siliang.ops.stored import StoredWeight, as_kept
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
        born: The moment of its allocation.
        made_by: The operator that made it, and the shape of its tensor.
        freed: The moment at which it was freed; None while it is alive.
        ref: Calls back when the storage is freed; None for memory within one operator.
    """

    nbytes: int
    category: Category
    layer: int | None
    born: int
    made_by: tuple[str, tuple[int, ...]]
    freed: int | None = None
    ref: weakref.ref[UntypedStorage] | None = None


@dataclass(frozen=True)
class Peak:
    """The moment with the most live bytes.

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
        block_bytes: A storage's size is rounded up to a multiple of it: CUDA_BLOCK_BYTES, or 1.
        vocabulary: Width of the logits.
        live_bytes: At this moment.
        peak_bytes: The most so far.
        counting: Count floating-point operations too.
        flops: Floating-point operations so far.
        layer_flops: Those of the layers' forward passes.
        boundary_bytes: Size of a layer's input, which a layer that recomputes keeps.
        layer_bytes: Activations of each layer after the forward pass through all of them: of the batch with the most.
    """

    block_bytes: int = 1
    vocabulary: int | None = None
    live_bytes: int = 0
    peak_bytes: int = 0
    counting: bool = False
    flops: int = 0
    layer_flops: int = 0
    boundary_bytes: int = 0
    layer_bytes: tuple[int, ...] = ()
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

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if any(issubclass(kind, StoredWeight) for kind in types):
            return NotImplemented  # its own operators are counted, which convert it
        if func is DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # a shortcut: this is called twice as often as all other operators
        out = func(*args, **(kwargs or {}))
        if self.counting and (count := flop_registry.get(func.overloadpacket)) is not None:
            flops = count(*args, **(kwargs or {}), out_val=out)
            self.flops += flops
            self.layer_flops += flops if self._layer is not None else 0
        for x in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(x, Tensor):
                self._track(x, func)
        if func.overloadpacket in KERNELS and kind_of(out) == "cpu":
            self._add_transient(_kernel_workspace(func.overloadpacket, args, out), func)
        return out

    def categorize(self, tensors: Iterable[Tensor], category: Category) -> None:
        """Sets the category of these tensors, and tracks those that are new."""
        for x in tensors:
            self._track(x).category = category

    @contextmanager
    def tracking(self, model: nn.Module, layers: list[nn.Module]) -> Iterator[None]:
        """Within the block, the model's tensors and those of its training steps get their categories.

        Args:
            layers: The model's stack; activations are counted by layer.
        """
        self._layers = len(layers)
        for p in model.parameters():
            self.categorize([p], "trained" if p.requires_grad else "weights")
        self.categorize(model.buffers(), "weights")
        handles = [
            p.register_post_accumulate_grad_hook(self._accumulated) for p in model.parameters() if p.requires_grad
        ]
        for i, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(partial(self._enter, i)))
            handles.append(layer.register_forward_hook(partial(self._leave, i)))
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
        """Forgets the peak, and starts again with the live storages."""
        self._all = list(self._alive.values())
        self.peak_bytes, self._peak_moment = self.live_bytes, self._moment
        self.layer_bytes = ()

    def peak(self, largest: int = 8) -> Peak:
        """The peak since the last `restart`, with its `largest` largest tensors."""
        at = self._peak_moment
        live = [s for s in self._all if s.born <= at and (s.freed is None or s.freed > at)]
        parts: Counter[Category] = Counter(dict.fromkeys(CATEGORIES, 0))
        for storage in live:
            parts[storage.category] += storage.nbytes
        layers = self._activations(live)
        live.sort(key=lambda storage: -storage.nbytes)
        return Peak(
            self.peak_bytes,
            dict(parts),
            layers,
            tuple((s.nbytes, s.category, *s.made_by) for s in live[:largest]),
        )

    def _activations(self, storages: Iterable[TrackedStorage]) -> tuple[int, ...]:
        """Of each layer."""
        layers = [0] * self._layers
        for storage in storages:
            if storage.layer is not None and storage.category == "activations":
                layers[storage.layer] += storage.nbytes
        return tuple(layers)

    def _track(self, x: Tensor, func: OpOverload | None = None) -> TrackedStorage:
        if isinstance(x, DTensor):
            x = x._local_tensor
        x = as_kept(x)
        storage = x.untyped_storage()
        key = storage._cdata
        if (known := self._alive.get(key)) is not None:
            return known
        self._moment += 1
        nbytes = self._rounded(storage)
        is_logits = self.vocabulary is not None and x.dim() > 1 and x.shape[-1] == self.vocabulary
        tracked = TrackedStorage(
            nbytes,
            "logits" if is_logits else "workspace",
            self._layer,
            self._moment,
            (str(func or ""), tuple(x.shape)),
        )
        tracked.ref = weakref.ref(storage, partial(self._freed, key))
        self._add(key, tracked)
        return tracked

    def _rounded(self, storage: UntypedStorage) -> int:
        return -(-storage.nbytes() // self.block_bytes) * self.block_bytes

    def _add(self, key: int, tracked: TrackedStorage) -> None:
        self._alive[key] = tracked
        self._all.append(tracked)
        self.live_bytes += tracked.nbytes
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self._peak_moment = self.live_bytes, self._moment

    def _add_transient(self, nbytes: int, func: OpOverload) -> None:
        """Counts memory that one operator allocates and frees."""
        if self.live_bytes + nbytes > self.peak_bytes:
            self._moment += 1
            transient = TrackedStorage(
                nbytes, "workspace", self._layer, self._moment, (str(func), ()), self._moment + 1
            )
            self._all.append(transient)
            self.peak_bytes, self._peak_moment = self.live_bytes + nbytes, self._moment
            self._moment += 1

    def _resized(self, storage: UntypedStorage) -> None:
        tracked = self._alive.get(key := storage._cdata)
        if tracked is not None and (nbytes := self._rounded(storage)) != tracked.nbytes:
            self._moment += 1
            tracked.freed = self._moment
            self.live_bytes -= tracked.nbytes
            self._add(key, replace(tracked, nbytes=nbytes, born=self._moment, freed=None))

    def _freed(self, key: int, ref: object) -> None:
        tracked = self._alive.pop(key)
        self._moment += 1
        tracked.freed = self._moment
        self.live_bytes -= tracked.nbytes

    def _saved(self, x: Tensor) -> Tensor:
        tracked = self._track(x)
        if tracked.category == "workspace":
            tracked.category = "activations"
        if tracked.layer is None:  # a tensor that several layers share is counted to the first, as the engine does
            tracked.layer = self._layer
        return x

    def _accumulated(self, p: Tensor) -> None:
        if p.grad is not None:
            self.categorize([p.grad], "gradients")

    def _enter(self, i: int, layer: nn.Module, args: tuple[object, ...]) -> None:
        self._layer = i
        self._gathered(layer, args)
        # a layer that recomputes keeps its input; autograd does not see it
        for x in args:
            if isinstance(x, Tensor) and (tracked := self._track(x)).category in ("workspace", "activations"):
                tracked.category, self.boundary_bytes = "activations", tracked.nbytes

    def _gathered(self, module: nn.Module, args: tuple[object, ...]) -> None:
        """Categorizes the weights that a sharded layer has just gathered."""
        for p in module.parameters():
            if (tracked := self._track(p)).category == "workspace":
                tracked.category = "weights"

    def _leave(self, i: int, layer: nn.Module, args: object, output: object) -> None:
        self._layer = None
        if i == self._layers - 1:
            self.layer_bytes = max(self.layer_bytes, self._activations(self._alive.values()), key=sum)


@contextmanager
def on_storage_resize(callback: Callable[[UntypedStorage], None]) -> Iterator[None]:
    """Within the block, calls back with each storage that is resized, in the whole process.

    Resizing is not an operator, and FSDP frees and allocates a layer's weights with it, so it can only be seen here.
    """
    resize = UntypedStorage.resize_

    def resized(storage: UntypedStorage, size: int) -> None:
        resize(storage, size)
        callback(storage)

    UntypedStorage.resize_ = resized  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        UntypedStorage.resize_ = resize


def _kernel_workspace(packet: OpOverloadPacket, args: tuple[object, ...], out: Tensor) -> int:
    """Bytes that an operator holds on a CPU besides its arguments and its result."""
    if isinstance(out, DTensor):  # not this process's share
        return 0
    if packet is SAFE_SOFTMAX:
        return out.numel()  # the mask of scores that are minus infinity
    operands = [x for x in args[:2] if isinstance(x, Tensor) and x.dim()]
    if len({x.dtype for x in operands}) < 2:
        return 0
    common = torch.result_type(*operands)
    return sum(x.numel() * common.itemsize for x in operands if x.dtype != common)  # a copy in the common dtype
