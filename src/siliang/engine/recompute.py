"""Chooses the layers that recompute their activations in the backward pass: as few as the memory budget allows.

Recomputing a layer costs a second forward pass of it, a third of a step if all layers do it. Keeping activations costs
memory in proportion to the batch's tokens. The cost per token is measured on the first batch; each later batch
recomputes only the layers that do not fit, from the lowest on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from siliang.engine.budget import MemoryBudget
from siliang.engine.patches import checkpoint_layers
from siliang.models.checkpointing import supports_checkpointing
from siliang.models.introspect import transformer_layers
from siliang.ops.stored import as_kept

FLAG = "gradient_checkpointing"  # of transformers' modules that can recompute


class Recompute:
    """Chooses for each batch.

    Attributes:
        layers: The layers that can recompute.
        recomputed: The number of layers that recomputed in the last batch.
        most: The largest such number so far.
        bytes_per_token: Each layer's activations per token; empty until they are measured.
    """

    def __init__(self, model: PreTrainedModel, budget: MemoryBudget, *, always: bool = False) -> None:
        """Prepares `model`.

        Args:
            budget: The memory budget; without a limit every layer keeps its activations.
            always: Recompute every layer.
        """
        self.layers = transformer_layers(model) if supports_checkpointing(model) else []
        self.recomputed = self.most = 0
        self.bytes_per_token: list[float] = []
        self._model, self._budget, self._always = model, budget, always
        self._boundary = 0.0  # bytes of a layer's input, for each token
        self._room: float | None = None
        self._prepared = False
        self._undo: list[Callable[[], object]] = []
        if always:
            self._enable()
            self.recomputed = self.most = len(self.layers)
        elif budget.limit is not None and self.layers:
            self._prepare()

    def fix(self, count: int) -> None:
        """Lets the `count` lowest layers recompute from now on, whatever the batch."""
        if not self._prepared:
            self._prepare()
        self._always = True
        self._set(count)

    @contextmanager
    def chosen(self, tokens: int, *, uneven: bool = False) -> Iterator[None]:
        """Sets the layers for a batch of `tokens` tokens, including computed padding; the first batch is measured.

        Args:
            uneven: The last layer computes some of this batch's tokens, and perhaps more of another's: it is taken to
                need as much as the one before it.
        """
        if self._always or self._budget.limit is None or not self.layers:
            yield
            return
        if not self.bytes_per_token:
            self._set(0)
            with self._measuring(tokens):
                yield
            if uneven:
                self.bytes_per_token[-1] = max(self.bytes_per_token[-2:])
            self._room = self._budget.for_activations()
            return
        self._set(self.needed(tokens))
        yield

    def recompute_all(self) -> bool:
        """Lets every layer recompute from now on; False if that changes nothing."""
        if self._always or not self.layers:
            return False
        self.fix(len(self.layers))
        return True

    def needed(self, tokens: int) -> int:
        """The number of layers that must recompute so that a batch of `tokens` tokens fits."""
        assert self._room is not None
        return layers_to_recompute([b * tokens for b in self.bytes_per_token], self._boundary * tokens, self._room)

    def close(self) -> None:
        """Restores the model for another run."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _enable(self) -> None:
        self._undo.append(checkpoint_layers(self._model))

    def _prepare(self) -> None:
        self._enable()
        for module in self._model.modules():  # only the layers recompute, no larger modules
            if hasattr(module, FLAG):
                setattr(module, FLAG, False)
        self._prepared = True
        self._set(0)

    def _set(self, count: int) -> None:
        for i, layer in enumerate(self.layers):
            layer.gradient_checkpointing = i < count
        self.recomputed = count
        self.most = max(self.most, count)

    @contextmanager
    def _measuring(self, tokens: int) -> Iterator[None]:
        parameters = (p for p in self._model.parameters() if not isinstance(p, DTensor))
        seen: set[int] = {as_kept(p).untyped_storage().data_ptr() for p in parameters}
        found = [0.0] * len(self.layers)
        now = -1

        def enter(i: int) -> Callable[[nn.Module, tuple[object, ...]], None]:
            def hook(module: nn.Module, args: tuple[object, ...]) -> None:
                nonlocal now
                now = i
                if args and isinstance(args[0], Tensor):
                    self._boundary = args[0].nbytes / tokens

            return hook

        def leave(module: nn.Module, args: object, output: object) -> None:
            nonlocal now
            now = -1

        def pack(x: Tensor) -> Tensor:
            if any(isinstance(w, nn.Parameter) for w in (x, x._base)):  # a sharded one moves at each gathering
                return x
            kept = as_kept(x).untyped_storage()
            where = kept.data_ptr()
            if now >= 0 and where not in seen:
                seen.add(where)
                found[now] += kept.nbytes()
            return x

        handles = [layer.register_forward_pre_hook(enter(i)) for i, layer in enumerate(self.layers)]
        handles += [layer.register_forward_hook(leave) for layer in self.layers]
        try:
            with saved_tensors_hooks(pack, lambda x: x):
                yield
        finally:
            for handle in handles:
                handle.remove()
        self.bytes_per_token = [b / tokens for b in found]


def layers_to_recompute(layer_bytes: Sequence[float], input_bytes: float, room: float) -> int:
    """The number of layers, from the lowest on, that must recompute so that the activations take at most `room` bytes;
    all layers if even that is not enough.

    Args:
        layer_bytes: The activations of each layer that keeps them.
        input_bytes: A layer's input, which a layer that recomputes keeps.
    """
    kept = sum(layer_bytes)
    for count, its_bytes in enumerate(layer_bytes):
        # one layer at a time holds all its activations while it recomputes
        if kept + max(layer_bytes[:count], default=0.0) <= room:
            return count
        kept += input_bytes - its_bytes
    return len(layer_bytes)
