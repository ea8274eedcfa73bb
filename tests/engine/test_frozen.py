"""What frozen layers say is computed once, exactly, or not kept at all."""

from typing import Any

import pytest
import torch
from tiny import TASK, make, without_dropout

import siliang
from siliang.data.collate import PadCollator
from siliang.engine.batches import StepCollator
from siliang.engine.frozen import Store, find_cut
from siliang.engine.padding import find_layers
from siliang.engine.step import Engine
from siliang.types import TaskType


def model_and_task(name: str) -> tuple[Any, TaskType]:
    task = TaskType(TASK[name])
    config = siliang.LoraConfig(task_type=task, layers_to_transform=[1], init_lora_weights=False)
    return siliang.get_peft_model(make(name), config).train(), task


def epochs(model: Any, task: TaskType, *, keep: bool, store: Store | None = None) -> tuple[list[float], Engine]:
    """The losses of three epochs of two batches whose rows meet in another order each time."""
    rows = []
    for i in range(6):
        ids = [5 + (7 * i + 3 * j) % 90 for j in range(4 + 2 * i)]
        rows.append({"input_ids": ids, "labels": i % 2 if task is TaskType.SEQ_CLS else list(ids)})
    engine = Engine(model, task, keep_frozen=keep)
    assert engine.padding is not None
    if store is not None and engine.padding.below is not None:
        engine.padding.below.store = store
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    losses = []
    for epoch in range(3):
        for part in (rows[epoch:] + rows[:epoch])[:3], (rows[epoch:] + rows[:epoch])[3:]:
            (batch,) = StepCollator(PadCollator(0), task, 8)([dict(row) for row in part])["batches"]
            with engine.loss(model, batch) as loss:
                (loss / batch.weight).backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    engine.padding.close()
    return losses, engine


@pytest.mark.parametrize("room", [(10**9, 0), (0, 10**9), (2_000, 10**9)], ids=["memory", "disk", "both"])
@pytest.mark.parametrize("name", ["llama", "bloom", "gpt2", "bert"])
def test_the_same_losses(name: str, room: tuple[int, int]) -> None:
    losses = []
    for keep in (False, True):
        model, task = model_and_task(name)
        without_dropout(model)
        found, engine = epochs(model, task, keep=keep, store=Store(*room))
        losses.append(found)
    # not to the last bit: the rows meet in other batches, and so in products of another shape
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert engine.padding is not None and engine.padding.below is not None
    assert engine.padding.below.hits == 4 and len(engine.padding.below.store) == 6


def test_no_room_no_harm() -> None:
    losses = []
    for keep in (False, True):
        model, task = model_and_task("llama")
        found, engine = epochs(model, task, keep=keep, store=Store(500, 500))
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert engine.padding is not None and engine.padding.below is not None
    assert engine.padding.below.hits == 0 and engine.padding.below.store.refused > 0


def test_dropout_below_turns_it_off_and_says_so() -> None:
    model, task = model_and_task("bert")
    _, engine = epochs(model, task, keep=True)
    assert engine.padding is not None and engine.padding.below is None
    assert "dropout of 0.1 below layer 1" in engine.notes[0]


def test_where_the_cut_is() -> None:
    model: Any = make("llama").requires_grad_(False)
    layers = find_layers(model)
    assert find_cut(model, layers).layer == 1  # the last layer is always computed
    layers[0].mlp.up_proj.requires_grad_(True)  # type: ignore[union-attr]
    assert find_cut(model, layers).layer == 0
    layers[0].requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    assert find_cut(model, layers).why_not == "the embeddings are trained"
