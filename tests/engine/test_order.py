"""The order of rows: random as the Trainer's, or by length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from siliang.engine.order import Order


class Numbers(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 37

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor(i)}


def test_random_order_is_that_of_the_stock_trainer(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), seed=3, data_seed=3, per_device_train_batch_size=4, use_cpu=True)
    args.remove_unused_columns = False
    model = torch.nn.Linear(1, 1)
    loader: Any = Trainer(model, args, train_dataset=Numbers()).get_train_dataloader()
    ours = Order([1] * 37, step=4, seed=3, by_length=False)
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        ours.set_epoch(epoch)
        assert [int(x) for batch in loader for x in batch["x"]] == list(ours)


@given(st.lists(st.integers(1, 99), min_size=1, max_size=300), st.integers(1, 9), st.integers(0, 5))
def test_by_length_each_row_comes_once_and_the_longest_first(lengths: list[int], step: int, seed: int) -> None:
    order = Order(lengths, step=step, seed=seed, by_length=True)
    first = list(order)
    assert sorted(first) == list(range(len(lengths)))
    assert lengths[first[0]] == max(lengths)
    assert list(order) == first


def test_by_length_steps_are_of_like_length_in_another_order_each_epoch() -> None:
    lengths = np.random.default_rng(0).integers(5, 80, 640)

    def waste(order: Order) -> float:
        steps = np.asarray(list(order)).reshape(-1, 16)
        return float(1 - lengths.sum() / (lengths[steps].max(1) * 16).sum())

    grouped = Order(lengths.tolist(), step=16, seed=0, by_length=True)
    assert waste(grouped) < 0.12 < 0.4 < waste(Order(lengths.tolist(), step=16, seed=0, by_length=False))
    first = list(grouped)
    grouped.set_epoch(1)
    assert list(grouped) != first
    # not one long way down: the mean length of a step says nothing of the next
    means = lengths[np.asarray(first).reshape(-1, 16)].mean(1)[1:]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.5
