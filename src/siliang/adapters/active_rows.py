"""The rows of the batch that a model computes, for its active adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor

from siliang.adapters.injection import Injection
from siliang.methods.batch_rows import BatchRows
from siliang.methods.task_ids import TaskIds


def active_rows(injection: Injection) -> list[BatchRows]:
    """Of each active adapter that computes the rows of a batch in their own ways."""
    found = [injection.adapters[name].rows for name in injection.active]
    return [rows for rows in found if rows is not None]


def trains_all_layers(injection: Injection) -> bool:
    """Whether the lowest layer's output depends on trained parameters outside the layers: a prompt, a mixture."""
    adapters = [injection.adapters[name] for name in injection.active]
    return any(one.prompt is not None or (one.rows is not None and one.rows.mixes_layers) for one in adapters)


def looks_ahead(injection: Injection) -> str | None:
    """Why what an active adapter computes for a token depends on later ones; None if it does not."""
    adapters = [injection.adapters[name] for name in injection.active]
    reasons = (layer.LOOKS_AHEAD for one in adapters for layer in one.layers.values())
    return next((reason for reason in reasons if reason is not None), None)


def trial_inputs(injection: Injection) -> dict[str, int]:
    """What the model is called with beside its tokens where nothing depends on them: rows of the first task."""
    return {"task_ids": 0} if any(isinstance(rows, TaskIds) for rows in active_rows(injection)) else {}


@contextmanager
def of_tasks(
    injection: Injection, ids: Tensor | Sequence[int] | int | None, *, repeated: bool = False
) -> Iterator[None]:
    """Within the block the rows of the model's batches are of these tasks. Other adapters do not ask for them.

    Args:
        ids: (B,), or one number for all rows; None: not known, or given outside of the block.
        repeated: A batch may hold each row several times, one after the other, as beams are.

    Raises:
        ConfigError: An active adapter has no such task.
    """
    with ExitStack() as stack:
        for rows in active_rows(injection) if ids is not None else ():
            if isinstance(rows, TaskIds):
                stack.enter_context(rows.given(ids, repeated=repeated))
        yield
