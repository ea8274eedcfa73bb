"""Batches that mix adapters: which adapter computes each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from siliang.language import Bilingual
from siliang.methods.batch_rows import BatchRows
from siliang.types import ConfigError

R = TypeVar("R")


class AdapterNames(BatchRows):
    """Which adapter computes each row of a batch ("__base__": none).

    Everything attached to one model shares the object.

    Args:
        names: One for each row.
        repeated: A batch may hold each row several times, one after the other, as beams are.
    """

    REMEDY: ClassVar[Bilingual] = Bilingual(
        "Use set_adapter, one adapter at a time.", "请用 set_adapter，一次一个适配器。"
    )

    def __init__(self, names: Sequence[str], *, repeated: bool) -> None:
        super().__init__("adapter_names")
        self._given, self._repeated = tuple(names), repeated
        self._now = self._given
        self.rows = len(self._now)

    def begin(self, rows: int, device: torch.device) -> None:
        super().begin(rows, device)
        given = len(self._given)
        if rows != given and (not self._repeated or rows % given):
            raise ConfigError(
                Bilingual(
                    f"adapter_names has {given} names for a batch of {rows} rows: name the adapter of each row.",
                    f"adapter_names 有 {given} 个名称，而批次有 {rows} 条样本：请写出每条样本的适配器。",
                )
            )
        self._now = tuple(name for name in self._given for _ in range(rows // given))

    def of(self, x: Tensor, *, routed: bool) -> tuple[str, ...]:
        """The adapter at each place of the first dimension of a layer's input, (B, ...) or, flattened, (B N, D).

        Raises:
            ConfigError: It is not known.
        """
        numbers = self.numbers(x, routed=routed)
        return self._now if numbers is None else tuple(self._now[i] for i in numbers.tolist())

    @contextmanager
    def only(self, names: Sequence[str]) -> Iterator[None]:
        """Within the block a module computes some rows of the batch, those of `names`."""
        before = self._now
        self._now, self.rows = tuple(names), len(names)
        try:
            yield
        finally:
            self._now, self.rows = before, len(before)


def by_row(
    rows: AdapterNames,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    run: Callable[..., R],
    *,
    where: str,
    routed: bool,
    copy_of: Callable[[str], str | None] = lambda name: name,
) -> R:
    """A batch that mixes adapters: each adapter's rows go through `run` together, and are put back in their order.

    Args:
        args, kwargs: What a module was called with: tensors whose first dimension is the batch, and what has no rows.
        run: Called with the adapter's name, and `args` and `kwargs` of its rows. It gives tensors with the same rows.
        where: What reads the batch, for errors.
        routed: It may read any tokens, as of `BatchRows.numbers`.
        copy_of: What `run` is called with for an adapter's name: rows with the same are computed together.

    Raises:
        ConfigError: Something has rows that cannot be attributed to the adapters.
    """
    leaves, tree = tree_flatten((args, kwargs))
    x = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), None)
    if x is None:
        raise ConfigError(
            Bilingual(
                f"adapter_names: {where} reads nothing that has rows.",
                f"adapter_names：{where} 没有读入任何带行的内容。",
            )
        )
    names = rows.of(x, routed=routed)
    copies = [copy_of(name) for name in names]
    parts: list[tuple[Tensor, R]] = []
    for copy in dict.fromkeys(copies):
        index = torch.tensor([i for i, c in enumerate(copies) if c == copy], device=x.device)
        own_args, own_kwargs = tree_unflatten([_rows_of(leaf, index, len(x), where) for leaf in leaves], tree)
        with rows.only([names[i] for i in index.tolist()]):
            parts.append((index, run(copy, *own_args, **own_kwargs)))
    return _joined(parts, len(x), where)


def _rows_of(leaf: object, index: Tensor, rows: int, where: str) -> object:
    if leaf is None or isinstance(leaf, bool | int | float | str | torch.dtype):
        return leaf
    if not isinstance(leaf, Tensor):
        raise ConfigError(
            Bilingual(
                f"adapter_names: {where} reads a {type(leaf).__name__}, which cannot be split into rows (for a cache: "
                "use_cache=False). Use set_adapter, one adapter at a time.",
                f"adapter_names：{where} 读入 {type(leaf).__name__}，无法按行拆分（若是缓存："
                "use_cache=False）。请用 set_adapter，一次一个适配器。",
            )
        )
    if not leaf.dim() or len(leaf) == 1 != rows:
        return leaf
    if len(leaf) != rows:
        raise ConfigError(
            Bilingual(
                f"adapter_names: {where} reads tensors of {rows} and of {len(leaf)} rows, and which adapter "
                "each is for "
                "is unknown. Use set_adapter, one adapter at a time.",
                f"adapter_names：{where} 读入 {rows} 行和 {len(leaf)} 行的张量，无法知道每行用哪个适配器。"
                "请用 set_adapter，一次一个适配器。",
            )
        )
    return leaf[index]


def _joined(parts: list[tuple[Tensor, R]], rows: int, where: str) -> R:
    """The outputs for parts of a batch as one, in the order of the batch."""
    flat = [tree_flatten(out) for _, out in parts]
    joined = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        if not isinstance(leaves[0], Tensor):
            joined.append(leaves[0])
            continue
        whole = leaves[0].new_empty((rows, *leaves[0].shape[1:]))
        for (index, _), leaf in zip(parts, leaves, strict=True):
            if not leaf.dim() or len(leaf) != len(index):
                raise ConfigError(
                    Bilingual(
                        f"adapter_names: {where} gives something that has no rows.",
                        f"adapter_names：{where} 的输出没有行。",
                    )
                )
            whole = whole.index_copy(0, index, leaf.to(whole.dtype))
        joined.append(whole)
    return tree_unflatten(joined, flat[0][1])  # pyright: ignore[reportReturnType], it has the outputs' own structure
