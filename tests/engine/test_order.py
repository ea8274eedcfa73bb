"""The order of rows: random as the Trainer's, by length, or by their beginnings."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from token_sets import token_set
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from siliang.config import RunConfig
from siliang.data.design_effect import design_effect
from siliang.data.row_beginnings import RowBeginnings
from siliang.data.small_table import SmallTable
from siliang.data.spec import LABEL, TokenColumn
from siliang.data.tokens import TokenSet
from siliang.engine.order import Order, groups_by_length
from siliang.tasks import SEQ_CLS


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


def labelled(lengths: np.ndarray, labels: list[Any], column: TokenColumn = LABEL) -> TokenSet:
    spec = replace(SEQ_CLS.data, columns=dict(SEQ_CLS.data.columns) | {"labels": column})
    columns: Any = {"input_ids": [[1] * n for n in lengths.tolist()], "labels": labels}
    return TokenSet(SmallTable(columns, {"input_ids": "int32", "labels": column.kind}), spec)


def test_the_design_effect_of_labels_that_depend_on_the_length() -> None:
    """It is 1 where they do not, and up to the rows of a step where they do."""
    rng = np.random.default_rng(0)
    lengths, chance = rng.integers(5, 80, 1600), rng.integers(0, 2, 1600)
    long = (lengths > 40).astype(int)
    assert design_effect(labelled(lengths, chance.tolist()), 16) == pytest.approx(1, abs=0.3)
    assert design_effect(labelled(lengths, long.tolist()), 16) > 14
    floats = TokenColumn(kind="float32", target=True)
    several = [[float(a), float(b)] for a, b in zip(long, chance, strict=True)]
    assert 6 < design_effect(labelled(lengths, several, floats), 16) < 10
    numbers = (lengths / 10 + chance / 2).tolist()
    assert design_effect(labelled(lengths, numbers, TokenColumn(many=False, kind="float32", target=True)), 16) > 10
    # rows of one length, sorted by their class in the file
    assert design_effect(labelled(np.full(1600, 7), [0] * 800 + [1] * 800), 16) == pytest.approx(1, abs=0.3)
    assert design_effect(labelled(lengths, [1] * 1600), 16) == design_effect(labelled(lengths[:20], [0] * 20), 16) == 1


@pytest.mark.parametrize(("task", "usual"), [("seq_cls", True), ("reranker", True), ("token_cls", False)])
def test_rows_are_grouped_by_length_unless_the_labels_depend_on_it(task: str, usual: bool) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 80, 1600)
    free, bound = (labelled(lengths, x.tolist()) for x in (rng.integers(0, 2, 1600), (lengths > 40).astype(int)))

    def config(grouped: bool | None) -> RunConfig:
        train = {"group_by_length": grouped}
        return RunConfig.build({"model": "m", "task": task, "data": {"train": "d"}, "output": "o", "train": train})

    assert groups_by_length(config(None), free) == usual and not groups_by_length(config(None), bound)
    assert all(groups_by_length(config(on), rows) == on for on in (True, False) for rows in (free, bound))
    assert list(Order.of(config(None), bound)) == list(Order.of(config(False), bound))


def grouped(rows: list[list[int]], *, step: int, by_length: bool = False) -> Order:
    lengths = [len(row) for row in rows]
    return Order(lengths, step=step, seed=3, by_length=by_length, beginnings=RowBeginnings.of(token_set(rows)))


def test_the_heaviest_comes_first_by_what_sharing_computes() -> None:
    """Also in a run that computes each row by itself, whose heaviest step may be another one: a run that is resumed
    with other settings of sharing or packing goes on in the same order."""
    rows = [[1] * 320 + [20 + i] * 16 for i in range(24)] + [[2 + i] * 200 for i in range(20)]
    lengths, beginnings = [len(row) for row in rows], RowBeginnings.of(token_set(rows))
    order = list(Order(lengths, step=4, seed=3, by_length=False, beginnings=beginnings))
    assert sum(lengths[i] for i in order[:4]) == 336 + 3 * 200


def rows_behind_prompts(prompts: int = 10, each: int = 13) -> list[list[int]]:
    """Rows of different lengths, those of a prompt far apart."""
    return [[i] * 48 + [20 + j] * (5 + (7 * j + i) % 40) for j in range(each) for i in range(prompts)]


@pytest.mark.parametrize("by_length", [False, True])
def test_by_beginnings_each_row_comes_once_and_steps_begin_alike(by_length: bool) -> None:
    rows = rows_behind_prompts()
    order = grouped(rows, step=8, by_length=by_length)
    found = RowBeginnings.of(token_set(rows))
    epochs: list[list[int]] = []
    for epoch in range(3):
        order.set_epoch(epoch)
        epochs.append(list(order))
        assert list(order) == epochs[-1] == list(grouped_at(rows, epoch, by_length))
        assert sorted(epochs[-1]) == list(range(len(rows)))
        steps = [epochs[-1][i : i + 8] for i in range(0, len(rows), 8)]
        prompts = [len({rows[i][0] for i in step}) for step in steps]
        assert max(prompts) <= 2 and sum(prompts) <= 10 + len(steps)
        computed = found.computed(steps).tolist()
        assert computed[0] == max(computed[:-1])  # of the whole steps
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # the steps of a prompt are not one behind the other, and each epoch puts other rows of it together
    firsts = [rows[i][0] for i in epochs[0][::8]]
    assert sum(a == b for a, b in pairwise(firsts)) < len(firsts) / 3
    together = [{frozenset(epoch[i : i + 8]) for i in range(0, len(rows), 8)} for epoch in epochs]
    assert by_length or not together[0] & together[1]


def grouped_at(rows: list[list[int]], epoch: int, by_length: bool) -> Order:
    order = grouped(rows, step=8, by_length=by_length)
    order.set_epoch(epoch)
    return order


def test_by_length_within_a_beginning() -> None:
    rows = rows_behind_prompts(2, 64)

    def spread(order: Order) -> float:
        steps = np.asarray([len(rows[i]) for i in order]).reshape(-1, 8)
        return float(np.ptp(steps, axis=1).mean())

    assert spread(grouped(rows, step=8, by_length=True)) < 0.5 * spread(grouped(rows, step=8))


def test_rows_that_have_nothing_in_common_are_in_the_order_without() -> None:
    rows = [[i] * (10 + i) for i in range(30)]
    lengths = [len(row) for row in rows]
    for by_length in (False, True):
        plain = Order(lengths, step=4, seed=3, by_length=by_length)
        assert list(grouped(rows, step=4, by_length=by_length)) == list(plain)


def test_the_settings_choose_it() -> None:
    rows = rows_behind_prompts()
    values = {"model": "m", "task": "causal_lm", "data": {"train": "d"}, "output": "o"}

    def order(**train: Any) -> list[int]:
        return list(Order.of(RunConfig.build(values | {"train": {"batch_size": 8, "seed": 3, **train}}), tokens))

    tokens = token_set(rows)
    assert order(group_by_beginnings=True) == list(grouped(rows, step=8)) != order()
    # the split of a step into batches changes no order
    assert order(group_by_beginnings=True) == order(group_by_beginnings=True, batch_size=4, gradient_accumulation=2)
