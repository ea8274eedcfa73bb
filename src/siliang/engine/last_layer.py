"""Runs the last layer on the tokens that are read.

    all T tokens   ->  [ norm, queries, keys, values ]  stops at the attention
    R read tokens  ->  [ norm, attention, output, feed-forward ]  ->  (1, R, D)

Behind the last attention a token that nothing reads changes nothing: one without a label, or all of a text but the
token that a classifier's head takes. The layer's own forward runs twice, first on all tokens as far as the attention.
Of labelled tokens, which are many, that pass computes the attention, too, and the second takes their results. Of one
token of each text, the second computes the attention, with the keys and values of the first.

Linear layers whose result a pass does not need are skipped in it. A trial run finds them by autograd: only
the queries depend on their output, or only keys and values, or only these three.

Shapes: T tokens, R read ones, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import cast

import torch
from torch import Tensor, nn

from siliang.data.batch import Batch
from siliang.engine.patches import patched
from siliang.methods.batch_rows import BatchRows
from siliang.models.introspect import is_linear, unwrapped
from siliang.ops.graph import leaves_of
from siliang.ops.layout import Layout
from siliang.ops.read_attention import AtAttentionError, FirstLayout, FirstPass, ReadLayout

Read = Callable[[Layout], ReadLayout]  # the tokens of a batch that are read
Reads = Callable[[Batch], Read | None]  # what is read of a batch; None for all
Forward = Callable[..., Tensor | tuple[Tensor, ...]]
CHECKPOINTED = "gradient_checkpointing"  # of transformers' layers


class LastLayer:
    """The last layer of a model without padding.

    Attributes:
        layer: The layer.
        layout: Where the tokens lie that the layer has computed; None if it has computed all.
        skips: Linear layers that make only queries are skipped where only keys are wanted, and the other way round.
        filler: What stands for the output of a skipped layer. With NaN a trial sees whether something uses it.
    """

    def __init__(self, layer: nn.Module, readers: list[BatchRows]) -> None:
        """
        Args:
            readers: As of `PaddingFree`.
        """
        self.layout: ReadLayout | None = None
        self.skips, self.filler = True, 0.0
        self.layer, self._readers = layer, readers
        self._parts: _Parts | None = None

    @contextmanager
    def reading(self, read: Read) -> Iterator[None]:
        """Within the block, which must include the backward pass, the layer computes only the tokens that are read."""
        own: Forward = self.layer.forward

        @wraps(own)  # whose arguments are looked up
        def forward(hidden_1TD: Tensor, **kwargs: object) -> Tensor | tuple[Tensor, ...]:
            if not isinstance(kwargs.get("attention_mask"), Layout):
                return own(hidden_1TD, **kwargs)
            if self._recomputes:  # both passes at once
                again = cast(Forward, self.layer._gradient_checkpointing_func)
                return again(partial(self._compute, own, read, kwargs), hidden_1TD)
            return self._compute(own, read, kwargs, hidden_1TD)

        try:
            with patched([(self.layer, forward)]):
                yield
        finally:
            self.layout = None

    @property
    def _recomputes(self) -> bool:
        layer = self.layer
        return bool(vars(layer).get(CHECKPOINTED)) and layer.training and torch.is_grad_enabled()

    def _compute(
        self, own: Forward, read: Read, kwargs: Mapping[str, object], hidden_1TD: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        whole = kwargs["attention_mask"]
        assert isinstance(whole, Layout)
        with self._without_checkpoint():
            self.layout = layout = read(whole)
            parts = self._parts if self.skips else NOTHING
            if parts is None:
                parts = self._parts = self._find_parts(own, layout, kwargs, hidden_1TD)
            first = FirstPass(attends=not layout.alone)
            with _skipped(parts.queries if layout.alone else {}, self.filler):
                try:
                    output = own(hidden_1TD, **{**kwargs, "attention_mask": FirstLayout.like(whole, first)})
                except AtAttentionError:
                    pass
                else:  # a layer without attention: what comes behind it is spared
                    return cast(Tensor, _select(layout, output))
            with _skipped(parts.keys if layout.alone else parts.all, self.filler):
                return self._second(own, layout, first, kwargs, hidden_1TD)

    def _second(
        self,
        own: Forward,
        layout: ReadLayout,
        first: FirstPass,
        kwargs: Mapping[str, object],
        hidden_1TD: Tensor,
    ) -> Tensor | tuple[Tensor, ...]:
        """The second pass, of the read tokens."""
        named = {name: _select(layout, value) for name, value in kwargs.items()}
        named["attention_mask"] = layout.after(first)
        with self._rows_of(layout):
            return own(layout.select(hidden_1TD), **named)

    def _find_parts(self, own: Forward, layout: ReadLayout, kwargs: Mapping[str, object], hidden_1TD: Tensor) -> _Parts:
        """Finds the linear layers that make only queries, and those that make only keys or values."""
        found = {m: list[Tensor]() for m in _outermost_linear(self.layer)}

        def cut(module: nn.Module, args: object, output: Tensor) -> Tensor:
            leaf = output.detach().requires_grad_()
            found[module].append(leaf)
            return leaf

        first = FirstPass(attends=False)
        with torch.enable_grad(), ExitStack() as stack:
            for module in found:
                stack.callback(module.register_forward_hook(cut).remove)
            with suppress(AtAttentionError):
                own(hidden_1TD, **{**kwargs, "attention_mask": FirstLayout.like(layout.whole, first)})
            if not first.made:
                return NOTHING
            once = {m: leaves[0] for m, leaves in found.items() if len(leaves) == 1}
            self._second(own, layout, first, kwargs, hidden_1TD)
        # one that computes more than twice is used for something else, too
        leaf_of = {m: leaf for m, leaf in once.items() if len(found[m]) == 2}
        q, k, v = first.made[0]
        to_q, to_k, to_v = ({id(leaf) for leaf in leaves_of(x)} for x in (q, k, v))
        to_k |= to_v

        def making(leaves: set[int]) -> dict[nn.Module, int]:
            return {m: leaf.shape[-1] for m, leaf in leaf_of.items() if id(leaf) in leaves}

        return _Parts(making(to_q - to_k), making(to_k - to_q), making(to_q | to_k))

    @contextmanager
    def _without_checkpoint(self) -> Iterator[None]:
        """Within the block the layer's own forward does not recompute: whoever called it does."""
        before = vars(self.layer).get(CHECKPOINTED)
        if before:
            setattr(self.layer, CHECKPOINTED, False)
        try:
            yield
        finally:
            if before:
                setattr(self.layer, CHECKPOINTED, before)

    @contextmanager
    def _rows_of(self, layout: ReadLayout) -> Iterator[None]:
        """Within the block adapters that compute each row in its own way get the rows of the read tokens."""
        before = [reader.layout for reader in self._readers]
        for reader in self._readers:
            reader.layout = layout
        try:
            yield
        finally:
            for reader, its in zip(self._readers, before, strict=True):
                reader.layout = its


@dataclass(frozen=True)
class _Parts:
    """The linear layers before the attention, each with the width of its output.

    Attributes:
        queries: Those that make queries alone.
        keys: Those that make keys or values alone.
        all: Those that make any of the three, and nothing else.
    """

    queries: Mapping[nn.Module, int] = field(default_factory=dict[nn.Module, int])
    keys: Mapping[nn.Module, int] = field(default_factory=dict[nn.Module, int])
    all: Mapping[nn.Module, int] = field(default_factory=dict[nn.Module, int])


NOTHING = _Parts()


def _skipped(modules: Mapping[nn.Module, int], filler: float) -> AbstractContextManager[None]:
    """Within the block these modules compute nothing."""

    def forward(width: int, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return x.new_full((), filler).expand(*x.shape[:-1], width)

    return patched((module, partial(forward, width)) for module, width in modules.items())


def _outermost_linear(layer: nn.Module) -> Iterable[nn.Module]:
    """The linear layers of a layer, with what methods have put around them."""
    for child in layer.children():
        if is_linear(unwrapped(child)):
            yield child
        else:
            yield from _outermost_linear(child)


def _select(layout: ReadLayout, value: object) -> object:
    """The read tokens of what has a row for each token."""
    if isinstance(value, tuple):
        return tuple(_select(layout, part) for part in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == (1, layout.whole.tokens):
        return layout.select(value)
    return value
