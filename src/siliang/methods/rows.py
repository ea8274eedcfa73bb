"""Batches that mix adapters: which adapter computes each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from siliang.types import ConfigError


class Rows:
    """Which adapter computes each row of the batch that is at work ("__base__": none).

    Everything attached to one model shares the object. The model's forward says how its batch stands to the names
    (`begin`), for generation repeats each row for its beams.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._now = self.names
        self._tokens: set[int] = set()

    def begin(self, batch: int, tokens: set[int]) -> None:
        """A forward begins, on a batch of so many rows of so many tokens each.

        Raises:
            ConfigError: The batch is no multiple of the names.
        """
        if batch % len(self.names):
            raise ConfigError(f"adapter_names has {len(self.names)} names for a batch of {batch}: one for each row.")
        repeat = batch // len(self.names)
        self._now, self._tokens = tuple(n for n in self.names for _ in range(repeat)), tokens

    def of(self, x: Tensor) -> tuple[str, ...]:
        """The adapter of each row of a layer's input, (B, ...) or, flattened, (B N, D).

        Raises:
            ConfigError: The input has other rows than the batch.
        """
        if len(x) == len(self._now):
            return self._now
        if x.dim() == 2 and len(x) in {len(self._now) * n for n in self._tokens}:
            return tuple(n for n in self._now for _ in range(len(x) // len(self._now)))
        raise ConfigError(
            f"adapter_names: a layer reads {len(x)} rows where the batch has {len(self._now)}, and whose they are "
            "cannot be told. Use set_adapter, one adapter at a time."
        )

    @contextmanager
    def only(self, names: Sequence[str]) -> Iterator[None]:
        """Within the block a module is at work on some rows of the batch, those of `names`."""
        before = self._now
        self._now = tuple(names)
        try:
            yield
        finally:
            self._now = before


def by_row(names: Sequence[str], x: Tensor, run: Callable[[str, Tensor], Tensor]) -> Tensor:
    """A batch that mixes adapters: each adapter's rows go through `run` together, and come back in their order.

    Args:
        names: The adapter of each row.
        x: (B, ...).
    """
    out: Tensor | None = None
    for name in dict.fromkeys(names):
        index = torch.tensor([i for i, n in enumerate(names) if n == name], device=x.device)
        part = run(name, x[index])
        if out is None:
            out = part.new_empty((len(x), *part.shape[1:]))
        out = out.index_copy(0, index, part)
    assert out is not None
    return out


def watch_batches(rows: Rows, modules: Sequence[nn.Module], *, repeated: bool) -> Callable[[], None]:
    """Lets the forward of each of `modules` begin a batch of `rows`.

    Args:
        repeated: A batch may hold each row several times, one after the other, as beams are.

    Returns:
        What ends it.
    """
    begins = partial(_begins, rows, repeated)
    hooks = [module.register_forward_pre_hook(begins, with_kwargs=True) for module in modules]

    def end() -> None:
        for hook in hooks:
            hook.remove()

    return end


def _begins(rows: Rows, repeated: bool, module: nn.Module, args: Any, kwargs: Any) -> None:
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    named = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
    tokens = [t for name in named if isinstance(t := kwargs.get(name), Tensor)] or tensors[:1]
    if not tokens:
        return
    batch = len(tokens[0])
    if batch != len(rows.names) and not repeated:
        raise ConfigError(
            f"adapter_names has {len(rows.names)} names for a batch of {batch} rows: name the adapter of each row."
        )
    rows.begin(batch, {t.shape[1] for t in tokens if t.dim() > 1})
