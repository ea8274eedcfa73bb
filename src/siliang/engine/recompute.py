"""Which layers keep the activations that their backward pass needs, and which recompute them. As many keep them as
memory allows.

Recomputing a layer costs its forward pass once more, a third of a step if all layers do it. Keeping costs memory in
proportion to the batch's tokens. What one token costs is measured on the first batch; each later batch recomputes the
layers that do not fit, from the lowest on, and no others.
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
from siliang.models.introspect import checkpointed_layers

FLAG = "gradient_checkpointing"  # of transformers' modules that can recompute


class Recompute:
    """Chooses for each batch.

    Attributes:
        layers: Those that can recompute.
        recomputed: How many did in the last batch.
        most: And in any so far.
        bytes_per_token: What keeping costs, of each layer; empty until it is measured.
    """

    def __init__(self, model: PreTrainedModel, budget: MemoryBudget, *, always: bool = False) -> None:
        """Prepares `model`.

        Args:
            budget: What may be taken; without a limit every layer keeps its activations.
            always: Recompute every layer.
        """
        self.layers = checkpointed_layers(model)
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
    def chosen(self, tokens: int) -> Iterator[None]:
        """For a batch of so many tokens, padding included where it is computed; the first of them is measured."""
        if self._always or self._budget.limit is None or not self.layers:
            yield
            return
        if not self.bytes_per_token:
            self._set(0)
            with self._measuring(tokens):
                yield
            self._room = self._budget.for_activations()
            return
        self._set(self.needed(tokens))
        yield

    def recompute_all(self) -> bool:
        """From now on every layer recomputes; False where that changes nothing."""
        if self._always or not self.layers:
            return False
        self.fix(len(self.layers))
        return True

    def needed(self, tokens: int) -> int:
        """How many layers have to recompute so that a batch of so many tokens fits."""
        assert self._room is not None
        return layers_to_recompute([b * tokens for b in self.bytes_per_token], self._boundary * tokens, self._room)

    def close(self) -> None:
        """Restores what was there before: the model may go to another run."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _enable(self) -> None:
        self._undo.append(checkpoint_layers(self._model))

    def _prepare(self) -> None:
        self._enable()
        for module in self._model.modules():  # what recomputes as a whole, beside its layers, does not
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
        seen: set[int] = {p.untyped_storage().data_ptr() for p in parameters}
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
            where = x.untyped_storage().data_ptr()
            if now >= 0 and where not in seen:
                seen.add(where)
                found[now] += x.untyped_storage().nbytes()
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
    """How many layers, from the lowest on, have to recompute so that the activations take no more than `room` bytes;
    all of them if even that is not enough.

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
