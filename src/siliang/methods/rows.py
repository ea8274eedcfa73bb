"""Batches that mix adapters: which adapter computes each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from siliang.language import Bilingual
from siliang.types import ConfigError

R = TypeVar("R")


class Rows:
    """Which adapter computes each row of the present batch ("__base__": none).

    Everything attached to one model shares the object. The model's forward calls `begin` with the size of its batch,
    because generation repeats each row for its beams.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._now = self.names
        self._tokens: set[int] = set()

    def begin(self, batch: int, tokens: set[int]) -> None:
        """A forward begins.

        Args:
            batch: Its rows.
            tokens: How many tokens a row has: the widths of the token tensors.

        Raises:
            ConfigError: The batch is not a multiple of the names.
        """
        if batch % len(self.names):
            raise ConfigError(
                Bilingual(
                    f"adapter_names has {len(self.names)} names for a batch of {batch}: one for each row.",
                    f"adapter_names 有 {len(self.names)} 个名称，而批次有 {batch} 条样本：每条样本一个名称。",
                )
            )
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
            Bilingual(
                f"adapter_names: a layer reads {len(x)} rows where the batch has {len(self._now)}, and which adapter "
                "each is for is unknown. Use set_adapter, one adapter at a time.",
                f"adapter_names：有一层读入 {len(x)} 行，而批次有 {len(self._now)} 条样本，"
                "无法知道每行用哪个适配器。请用 set_adapter，一次一个适配器。",
            )
        )

    @contextmanager
    def only(self, names: Sequence[str]) -> Iterator[None]:
        """Within the block a module computes some rows of the batch, those of `names`."""
        before = self._now
        self._now = tuple(names)
        try:
            yield
        finally:
            self._now = before


def by_row(
    rows: Rows,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    run: Callable[..., R],
    *,
    where: str,
    copy_of: Callable[[str], str | None] = lambda name: name,
) -> R:
    """A batch that mixes adapters: each adapter's rows go through `run` together, and are put back in their order.

    Args:
        args, kwargs: What a module was called with: tensors whose first dimension is the batch, and what has no rows.
        run: Called with the adapter's name, and `args` and `kwargs` of its rows. It gives tensors with the same rows.
        where: What reads the batch, for errors.
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
    names = rows.of(x)
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


def watch_batches(rows: Rows, modules: Sequence[nn.Module], *, repeated: bool) -> Callable[[], None]:
    """Hooks through which the forward of each of `modules` begins a batch of `rows`.

    Args:
        repeated: A batch may hold each row several times, one after the other, as beams are.

    Returns:
        A function that removes the hooks.
    """
    begins = partial(_begins, rows, repeated)
    hooks = [module.register_forward_pre_hook(begins, with_kwargs=True) for module in modules]

    def end() -> None:
        for hook in hooks:
            hook.remove()

    return end


def _begins(rows: Rows, repeated: bool, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    tokens = token_tensors(args, kwargs)
    if not tokens:
        return
    batch = len(tokens[0])
    if batch != len(rows.names) and not repeated:
        raise ConfigError(
            Bilingual(
                f"adapter_names has {len(rows.names)} names for a batch of {batch} rows: name the adapter of each row.",
                f"adapter_names 有 {len(rows.names)} 个名称，而批次有 {batch} 条样本：请写出每条样本的适配器。",
            )
        )
    rows.begin(batch, {t.shape[1] for t in tokens if t.dim() > 1})


def token_tensors(args: tuple[object, ...], kwargs: dict[str, object]) -> list[Tensor]:
    """What a model was called with that has its tokens, or their embeddings: the batch is the first dimension."""
    named = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    return [t for name in named if isinstance(t := kwargs.get(name), Tensor)] or tensors[:1]
