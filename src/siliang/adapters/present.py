"""What the active adapters of a model know of the batch that it computes at present."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor

from siliang.adapters.injection import Injection
from siliang.methods.present_batch import PresentBatch, TaskIds


def present_batches(injection: Injection) -> list[PresentBatch]:
    """Of each active adapter that computes the rows of a batch in their own ways."""
    found = [injection.adapters[name].batch for name in injection.active]
    return [batch for batch in found if batch is not None]


def trains_all_layers(injection: Injection) -> bool:
    """Whether what the lowest layer gives follows from what is trained, wherever that is: a prompt, a mixture."""
    adapters = [injection.adapters[name] for name in injection.active]
    return any(one.prompt is not None or (one.batch is not None and one.batch.mixes_layers) for one in adapters)


def trial_inputs(injection: Injection) -> dict[str, int]:
    """What the model is called with beside its tokens where nothing depends on them: rows of the first task."""
    return {"task_ids": 0} if any(isinstance(batch, TaskIds) for batch in present_batches(injection)) else {}


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
        for batch in present_batches(injection) if ids is not None else ():
            if isinstance(batch, TaskIds):
                stack.enter_context(batch.given(ids, repeated=repeated))
        yield
