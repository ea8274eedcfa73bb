"""The loss of a whole optimizer step, whose gradient reaches the model batch by batch.

The values of all sequences are computed first, without gradients. The loss of the step gives the gradient of each
value. Then each batch is run again, and the gradients of its values are backpropagated (gradient caching, Gao et al.
2021, arXiv 2101.06983). The memory is that of one batch; the gradient is that of all rows at once. A step of one batch
on one rank is run once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from siliang.data.batch import Batch
from siliang.engine.random_state import RandomState, random_state, set_random_state
from siliang.engine.reference_store import ReferenceStore
from siliang.tasks import EntryValues, StepLoss

Context = Callable[[], AbstractContextManager[object]]
ByEntry = dict[int, EntryValues]
Gather = Callable[[ByEntry], list[ByEntry]]  # all-gather of the values over ranks


class Values(Protocol):
    """The part of the engine that is used here."""

    def values(self, model: nn.Module, batch: Batch) -> AbstractContextManager[Tensor]:
        """The values of each sequence of the batch for the loss. Run backward within the block."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within the block, the model runs without its adapter, if it has one."""
        ...

    reference_store: ReferenceStore | None


def alone(own: ByEntry) -> list[ByEntry]:
    """The gather function of a single rank."""
    return [own]


def run_step(
    engine: Values,
    step: StepLoss,
    model: nn.Module,
    batches: Sequence[Batch],
    weight: float,
    autocast: Context,
    no_sync: Context,
    backward: Callable[[Tensor], object],
    gather: Gather,
) -> Tensor:
    """Forward and backward of one optimizer step; the arguments are those of `Engine.run`.

    Returns:
        The mean loss of this rank's share, a scalar. The mean over ranks is the loss of the step.
    """
    batches = [_numbered(batch, number) for batch, number in zip(batches, _firsts(batches), strict=True)]
    if step.separable or (len(batches) == 1 and gather is alone):
        return run_batches(engine, step, model, batches, weight, autocast, no_sync, backward)
    reference = reference_values(engine, step, model, batches, autocast)
    states: list[RandomState] = []  # each batch is run twice with the same dropout
    own: ByEntry = {}
    for batch in batches:
        states.append(random_state())
        with torch.no_grad(), autocast(), engine.values(model, batch) as values:
            own |= by_entry(batch, values.detach(), reference)
    for kept in own.values():
        kept.values.requires_grad_()
    ranks = gather({i: _on_cpu(kept) for i, kept in own.items()}) if gather is not alone else [own]
    device = next(model.parameters()).device
    everyone = {i: on(kept, device) for rank in ranks for i, kept in rank.items()} | own
    loss = loss_of(step, everyone) / weight
    wanted = [kept.values for kept in own.values()]
    gradients = dict(zip(own, torch.autograd.grad(loss, wanted), strict=True)) if own else {}
    for number, (batch, state) in enumerate(zip(batches, states, strict=True)):
        set_random_state(state)
        with (
            nullcontext() if number == len(batches) - 1 else no_sync(),
            autocast(),
            engine.values(model, batch) as values,
        ):
            factors = [gradients[i] for i in batch.entries]  # empty for a dummy batch
            backward((values * torch.cat(factors)).sum() if factors else values.sum() * 0.0)
    return loss.detach() / len(ranks)


def run_batches(
    engine: Values,
    step: StepLoss,
    model: nn.Module,
    batches: Sequence[Batch],
    weight: float,
    autocast: Context,
    no_sync: Context,
    backward: Callable[[Tensor], object],
) -> Tensor:
    """The same where no entry depends on one of another batch: each batch is run once, and no rank asks the others."""
    mean = torch.zeros((), device=next(model.parameters()).device)
    for number, batch in enumerate(batches):
        reference = reference_values(engine, step, model, [batch], autocast)
        last = number == len(batches) - 1
        with nullcontext() if last else no_sync(), autocast(), engine.values(model, batch) as values:
            with torch.autocast(values.device.type, enabled=False):
                found = by_entry(batch, values, reference)
                loss = loss_of(step, found) / weight if found else values.sum() * 0.0
            backward(loss)
        mean += loss.detach()
    return mean


def reference_values(
    engine: Values, step: StepLoss, model: nn.Module, batches: Sequence[Batch], autocast: Context
) -> dict[int, Tensor]:
    """The values of each entry without the adapter; empty if the loss does not use them."""
    found: dict[int, Tensor] = {}
    if step.reference:
        for batch in batches:
            values = reference_of(engine, model, batch, autocast)
            found |= dict(zip(batch.entries, _of_entries(batch, values), strict=True)) if batch.entries else {}
    return found


def reference_of(engine: Values, model: nn.Module, batch: Batch, autocast: Context) -> Tensor:
    """The values of each sequence of a batch without the adapter, (S, ...)."""
    store = engine.reference_store
    if store is not None and (kept := store.find(batch)) is not None:
        return kept
    found = _computed(engine, model, batch, autocast)
    if store is not None and found.ndim == 2 and not batch.is_dummy:
        store.add(batch, found)
    return found


def keep_reference(engine: Values, model: nn.Module, batches: Iterable[Batch], autocast: Context) -> None:
    """Computes and keeps the values that the model gives before its first step."""
    store, device = engine.reference_store, next(model.parameters()).device
    assert store is not None
    for batch in batches:
        batch = batch.to(device)
        values = _computed(engine, model, batch, autocast)  # of a dummy, too: FSDP gathers weights on all ranks
        if not batch.is_dummy:
            store.add(batch, values)


def _computed(engine: Values, model: nn.Module, batch: Batch, autocast: Context) -> Tensor:
    with engine.reference(), autocast(), engine.values(model, batch) as values:
        return values


def by_entry(batch: Batch, values: Tensor, reference: Mapping[int, Tensor]) -> ByEntry:
    """The values of each entry of a batch."""
    if not batch.entries:
        return {}
    own = zip(batch.entries, _of_entries(batch, values), strict=True)
    return {i: EntryValues(part, reference.get(i)) for i, part in own}


def loss_of(step: StepLoss, found: Mapping[int, EntryValues]) -> Tensor:
    """The sum over these entries."""
    kept = [found[i] for i in sorted(found)]
    return step.loss([k.values for k in kept], [k.reference for k in kept if k.reference is not None])


def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """The log-probability of each label, (N,), in fp32.

    Args:
        logits: (N, V).
        labels: (N,).
    """
    return logits.float().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def _of_entries(batch: Batch, values: Tensor) -> Sequence[Tensor]:
    return values.split(batch.sizes or [1] * len(batch))


def _firsts(batches: Sequence[Batch]) -> list[int]:
    """The index of each batch's first entry within the step."""
    return list(accumulate(map(len, batches), initial=0))[:-1]


def _numbered(batch: Batch, first: int) -> Batch:
    """The batch with entry numbers, if it has none and is not a dummy."""
    if batch.entries or not batch.weight:
        return batch
    return replace(batch, entries=tuple(range(first, first + len(batch))))


def on(kept: EntryValues, device: torch.device) -> EntryValues:
    return EntryValues(kept.values.to(device), None if kept.reference is None else kept.reference.to(device))


def _on_cpu(kept: EntryValues) -> EntryValues:
    return on(EntryValues(kept.values.detach(), kept.reference), torch.device("cpu"))
