"""Rows for a step of any task, and the gradients of its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny import VOCABULARY
from torch import Tensor, nn

from siliang.data.collate import PadCollator
from siliang.tasks import SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS, Task


def rows_for(task: Task, lengths: tuple[int, ...] = (9, 4, 6, 6, 2)) -> list[dict[str, Any]]:
    """Entries of these lengths, the same each time."""
    g = torch.Generator().manual_seed(1)
    rows: list[dict[str, Any]] = []
    for i, n in enumerate(lengths):
        ids = torch.randint(5, VOCABULARY, (n,), generator=g).tolist()
        labels: Any = [-100] * (n // 2) + ids[n // 2 :]
        if task is SEQ_CLS:
            labels = i % 3
        elif task is TOKEN_CLS:
            labels = [-100, *(j % 3 for j in range(n - 1))]
        elif task is SEQ_2_SEQ_LM:
            labels = ids[: 2 + n // 3]
        rows.append({"input_ids": ids, "labels": labels, "row": i})
    return rows


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows as one batch of a model of transformers."""
    return PadCollator(0)([{key: value for key, value in row.items() if key != "row"} for row in rows])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name; the model has none afterwards."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def losses_of_steps(
    model: nn.Module, loss_of: Callable[[Any], Tensor], *, steps: int = 5, lr: float = 1e-2, eps: float = 1e-8
) -> list[float]:
    """The losses of a few steps of AdamW on what the model trains."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, eps=eps)
    losses: list[float] = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
