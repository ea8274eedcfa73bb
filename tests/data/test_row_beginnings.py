"""Rows by their beginnings, against prefixes that are compared token by token."""

from __future__ import annotations

import random
from itertools import groupby

import numpy as np
from datasets import Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from token_sets import token_set

from siliang.data.row_beginnings import BLOCK, RowBeginnings, row_beginnings
from siliang.data.small_table import SmallTable
from siliang.data.tokens import TokenSet
from siliang.tasks import PREFERENCE, SEQ_CLS


def rows_of(seed: int) -> list[list[int]]:
    """Rows of which most continue a part of an earlier one."""
    rng = random.Random(seed)
    found: list[list[int]] = []
    for _ in range(rng.randint(2, 24)):
        before = rng.choice([[], *found])
        begun = before[: rng.randint(0, len(before))]
        row = begun + rng.choices(range(5), k=rng.randint(1, 50))
        found += [] if row in found else [row]
    return found


def prefixes(row: list[int]) -> list[tuple[int, ...]]:
    """Its beginnings of whole blocks."""
    return [tuple(row[:n]) for n in range(BLOCK, len(row) + 1, BLOCK)]


def assert_together(order: list[int], rows: list[list[int]]) -> None:
    """Rows with a common beginning follow one another, at every depth."""
    assert sorted(order) == list(range(len(rows)))
    for blocks in range(1, max(map(len, rows)) // BLOCK + 1):
        n = BLOCK * blocks
        groups = [key for key, _ in groupby(tuple(rows[i][:n]) if len(rows[i]) >= n else i for i in order)]
        assert len(groups) == len(set(groups))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5))
def test_rows_that_begin_alike_are_together(seed: int, size: int) -> None:
    rows, rng = rows_of(seed), np.random.default_rng(seed)
    found = RowBeginnings.of(token_set(rows))
    assert_together(found.order.tolist(), rows)
    salt, behind = int(rng.integers(2**62)), rng.random(len(rows))
    shuffled = found.shuffled(salt, behind)
    assert_together(shuffled, rows)
    assert shuffled == found.shuffled(salt, behind)
    parts = [shuffled[i : i + size] for i in range(0, len(rows), size)]
    for part, computed in zip(parts, found.computed(parts).tolist(), strict=True):
        blocks = [prefix for i in part for prefix in prefixes(rows[i])]
        assert computed == sum(len(rows[i]) for i in part) - BLOCK * (len(blocks) - len(set(blocks)))
    everywhere = [prefix for row in rows for prefix in prefixes(row)]
    several = [prefix for prefix in everywhere if everywhere.count(prefix) > 1]
    assert found.share == BLOCK * len(several) / sum(map(len, rows))


def test_the_order_is_another_for_each_salt_and_rows_that_begin_alike_are_in_that_of_the_second() -> None:
    tops = [[i] * 20 for i in range(6)]
    found = RowBeginnings.of(token_set([top + [7 + j] * 3 for top in tops for j in range(4)]))
    behind = np.tile([0.8, 0.2, 0.4, 0.6], 6)
    orders = {salt: found.shuffled(salt, behind) for salt in range(4)}
    assert len({tuple(order) for order in orders.values()}) == 4
    for order in orders.values():
        assert all([i % 4 for i in order[start : start + 4]] == [1, 2, 3, 0] for start in range(0, 24, 4))


def test_what_grouping_saves() -> None:
    """20 prompts of 160 tokens before 5 rows of 16 each: a step of 5 computes 240 tokens instead of up to 880."""
    rows = [[i] * 160 + [30 + j] * 16 for i in range(20) for j in range(5)]
    found = RowBeginnings.of(token_set(rows))
    assert found.worth and found.share == 160 / 176
    assert found.computed([list(range(5)), list(range(0, 100, 20))]).tolist() == [240, 880]
    assert 0.65 < found.gain(5, 5) < 1 - 240 / 880
    assert found.gain(100, 5) == 0.0  # all rows are in one step anyway
    apart = RowBeginnings.of(token_set([[i] * 40 for i in range(9)]))
    assert not apart.worth and apart.share == apart.gain(3, 3) == 0.0


def test_copies_of_a_row_are_far_apart() -> None:
    """Those of a source that weighs 3: each third of an epoch has one of each, those that begin alike together."""
    rows = [[i] * 40 + [j] for i in range(4) for j in range(5)]
    shuffled = RowBeginnings.of(token_set(rows * 3)).shuffled(5, np.random.default_rng(0).random(60))
    for start in (0, 20, 40):
        third = [i % 20 for i in shuffled[start : start + 20]]
        assert_together(third, rows)


def test_of_several_sequences_the_first_counts_and_what_they_share() -> None:
    prompt, other = [5] * 32, [6] * 32
    rows = [[*prompt, 7, *prompt, 8, 8], [*other, 7, *other, 9], [*prompt, 9, *prompt, 7]]
    tokens = token_set(rows, PREFERENCE, sequences=[[33, 34], [33, 33], [33, 33]])
    found = row_beginnings(tokens)
    assert found is row_beginnings(tokens)
    assert found.lengths.tolist() == [35, 34, 34]
    assert found.computed([[0, 2], [0, 1]]).tolist() == [37, 69]


def test_the_types_of_tokens_are_read_too() -> None:
    rows = [[5] * 20, [5] * 20, [5] * 20]
    found = RowBeginnings.of(token_set(rows, token_type_ids=[[0] * 20, [1] * 20, [0] * 20]))
    assert found.computed([[0, 1], [0, 2]]).tolist() == [40, 24]


def test_a_set_of_one_row_or_none() -> None:
    assert RowBeginnings.of(token_set([[5] * 40])).shuffled(3, np.zeros(1)) == [0]
    found = RowBeginnings.of(token_set([]))
    assert len(found) == 0 and not found.worth and found.computed([]).tolist() == []


def test_types_that_no_row_has() -> None:
    """As of a decoder that learns classes, in a small table and in one of a file."""
    rows = [[5] * 20, [5] * 20, [6] * 20]
    columns = {"input_ids": rows, "token_type_ids": [None] * 3}
    kinds = Features({name: List(Value("int32")) for name in columns})
    small = SmallTable({name: [*values] for name, values in columns.items()}, dict.fromkeys(columns, "int32"))
    for table in (small, Dataset.from_dict(columns, features=kinds)):
        found = RowBeginnings.of(TokenSet(table, SEQ_CLS.data))
        assert found.computed([[0, 1], [0, 2]]).tolist() == [24, 40]
