"""The batch that the model computes at present, for adapters that compute each of its rows in its own way.

Shapes: B rows of the batch, N tokens of a padded row, T tokens of all rows once the padding is gone, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.rows import token_tensors
from siliang.models.introspect import backbone, encoder, is_encoder_decoder
from siliang.ops.packed_attention import Layout
from siliang.secrets import short_repr
from siliang.types import ConfigError

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class PresentBatch:
    """What an adapter knows of the batch. The model's forward begins a batch; the backward pass, which may compute
    layers again, still finds it.

    Attributes:
        layout: Where the rows lie while the batch has no padding: whoever takes the padding out sets it.
        mixes_layers: What a layer adds follows from something that is trained outside of it.
    """

    mixes_layers: ClassVar[bool] = False

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.rows = 0
        self.device = torch.device("cpu")
        self._widths: set[int] = set()

    def watch(self, model: nn.Module) -> Callable[[], None]:
        """Hooks through which the model's forward begins a batch.

        Returns:
            A function that removes them.
        """
        hosts: dict[nn.Module, None] = dict.fromkeys(
            [model, backbone(model), *([encoder(model)] if is_encoder_decoder(model) else [])]
        )
        hooks = [
            host.register_forward_pre_hook(partial(self._enter, host is model), with_kwargs=True) for host in hosts
        ]

        def remove() -> None:
            for hook in hooks:
                hook.remove()

        return remove

    def _enter(self, whole: bool, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        tokens = token_tensors(args, kwargs)
        if not tokens:
            return
        self._widths = (set() if whole else self._widths) | {t.shape[1] for t in tokens if t.dim() > 1}
        self.begin(len(tokens[0]), tokens[0].device)

    def begin(self, rows: int, device: torch.device) -> None:
        """A batch begins.

        Args:
            rows: B.
        """
        self.rows, self.device = rows, device

    def at(self, of_rows: Tensor, x: Tensor) -> Tensor:
        """What each row has, at the places of a layer's input.

        Args:
            of_rows: (B, ...).
            x: (B, N, D), or (B, D), or of the tokens alone (1, T, D), or flattened (B N, D).

        Returns:
            (B, 1, ...), (B, ...), (1, T, ...) or (B N, ...).

        Raises:
            ConfigError: The input has other rows than the batch.
        """
        B, layout = len(of_rows), self.layout
        if len(x) == B:
            return of_rows.view(B, *[1] * (x.dim() - 2), *of_rows.shape[1:])
        if layout is not None and x.shape[:-1].numel() == layout.tokens:
            index = torch.tensor([i for i, n in enumerate(layout.lengths) for _ in range(n)]).to(x.device)
            return of_rows[index].view(*x.shape[:-1], *of_rows.shape[1:])
        if x.dim() == 2 and len(x) in {B * width for width in self._widths}:
            return of_rows.repeat_interleave(len(x) // B, 0)
        raise ConfigError(
            Bilingual(
                f"A layer reads {len(x)} rows where the batch has {B}, and which row each is of is unknown: leave this "
                "layer out of target_modules.",
                f"有一层读入 {len(x)} 行，而批次有 {B} 条样本，无法知道每行属于哪一条："
                "请从 target_modules 中去掉这一层。",
            )
        )


class TaskIds(PresentBatch):
    """The task of each row, for methods that train several tasks at once.

    Args:
        tasks: How many there are.
        setting: What the config calls this number.
    """

    def __init__(self, tasks: int, setting: str) -> None:
        super().__init__()
        self.tasks, self.setting = tasks, setting
        self._given: Tensor | int | None = None
        self._now: Tensor | int | None = None
        self._repeated = False

    @contextmanager
    def given(self, ids: Tensor | Sequence[int] | int | None, *, repeated: bool = False) -> Iterator[None]:
        """Within the block the rows of the model's batches are of these tasks.

        Args:
            ids: (B,), or one number for all rows.
            repeated: A batch may hold each row several times, one after the other, as beams are.

        Raises:
            ConfigError: There is no such task, or the ids are no whole numbers.
        """
        ids = _whole_numbers(ids)
        found: list[int] = [ids] if isinstance(ids, int) else []
        if isinstance(ids, Tensor) and not hasattr(ids, "fake_mode"):  # a plan's tensors have no values
            found = ids.tolist()
        if wrong := next((task for task in found if not 0 <= task < self.tasks), None):
            raise no_such_task(wrong, self.tasks, self.setting)
        before = self._given, self._repeated
        self._given, self._repeated = ids, repeated
        try:
            yield
        finally:
            self._given, self._repeated = before

    def begin(self, rows: int, device: torch.device) -> None:
        super().begin(rows, device)
        ids = self._given
        if isinstance(ids, Tensor) and len(ids) != rows:
            if not self._repeated or rows % max(len(ids), 1):
                raise ConfigError(
                    Bilingual(
                        f"task_ids has {len(ids)} numbers for a batch of {rows} rows: give the task of each row.",
                        f"task_ids 有 {len(ids)} 个编号，而批次有 {rows} 条样本：请给出每条样本的任务。",
                    )
                )
            ids = ids.repeat_interleave(rows // len(ids))
        self._now = ids

    @property
    def ids(self) -> Tensor:
        """(B,)

        Raises:
            ConfigError: There are several tasks, and the rows' are not known.
        """
        ids = self._now
        if ids is None and self.tasks > 1:
            raise ConfigError(
                Bilingual(
                    f"The adapter has {self.setting} = {self.tasks}: call the model with task_ids, the task of each "
                    "row, or one number for all.",
                    f"适配器的 {self.setting} = {self.tasks}：调用模型时请给出 task_ids，即每条样本的任务，"
                    "或用一个编号表示全部。",
                )
            )
        if isinstance(ids, Tensor):
            return ids.to(self.device)
        return torch.full((self.rows,), ids or 0, device=self.device)


def _whole_numbers(ids: Tensor | Sequence[int] | int | None) -> Tensor | int | None:
    """(B,), or one number for all rows.

    Raises:
        ConfigError: The ids are no whole numbers.
    """
    if ids is None or (isinstance(ids, int) and not isinstance(ids, bool)):
        return ids
    try:
        found = torch.as_tensor(ids).reshape(-1)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # text, lists of lists that differ in length
        found = None
    if found is None or found.dtype not in _WHOLE:
        shown = f"<{ids.dtype}>" if isinstance(ids, Tensor) else short_repr(ids)
        raise ConfigError(
            Bilingual(
                f"task_ids = {shown}: must be whole numbers, the task of each row, or one number for all.",
                f"task_ids = {shown}：须为整数，即每条样本的任务，或用一个编号表示全部。",
            )
        )
    return found.long()


def no_such_task(task: int, tasks: int, setting: str) -> ConfigError:
    """The error for a task that an adapter does not have."""
    return ConfigError(
        Bilingual(
            f"task {task}: {setting} = {tasks} has tasks 0 to {tasks - 1}. Set {setting} = {task + 1} or more, "
            "or give other task ids."
            if task >= 0
            else f"task {task}: a task id must be 0 or more.",
            f"任务 {task}：{setting} = {tasks} 只有任务 0 到 {tasks - 1}。请把 {setting} 设为 {task + 1} 或更大，"
            "或改用别的任务编号。"
            if task >= 0
            else f"任务 {task}：任务编号须大于等于 0。",
        )
    )
