"""The task of each row of a batch, for methods that train several tasks at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from siliang.language import Bilingual
from siliang.methods.batch_rows import BatchRows
from siliang.secrets import short_repr
from siliang.types import ConfigError

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class TaskIds(BatchRows):
    """The task of each row, for methods that train several tasks at once.

    Args:
        tasks: How many there are.
        setting: What the config calls this number.
    """

    def __init__(self, tasks: int, setting: str) -> None:
        super().__init__(setting)
        self.tasks = tasks
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
