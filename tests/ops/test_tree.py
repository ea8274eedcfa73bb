"""Trees of sequences that begin with the same tokens, and attention over them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from siliang.ops.beginnings import LEAST_SAVED, LEAST_SHARE, Beginnings, find_beginnings
from siliang.ops.layout import Layout
from siliang.ops.packed_attention import packed_attention

CPU = torch.device("cpu")


@st.composite
def texts(draw: st.DrawFn) -> list[list[int]]:
    """Some sequences, most of which continue a part of an earlier one."""
    token, found = st.integers(0, 3), list[list[int]]()
    for _ in range(draw(st.integers(2, 6))):
        before = draw(st.sampled_from([[], *found]))
        begun = before[: draw(st.integers(0, len(before)))]
        found.append(begun + draw(st.lists(token, min_size=0 if begun else 1, max_size=9)))
    return found


def tree_of(rows: list[list[int]], least: int) -> Beginnings:
    """Their tree; where they share too little, that of separate sequences."""
    found = find_beginnings([np.asarray(row, np.int32).tobytes() for row in rows], 4, least)
    return found or Beginnings.apart([len(row) for row in rows])


@settings(max_examples=200, deadline=None)
@given(texts(), st.sampled_from([1, 2, 5]), st.sampled_from([0, 3, 20]))
def test_a_tree_holds_each_sequence(rows: list[list[int]], least: int, virtual: int) -> None:
    tree = tree_of(rows, least)
    tokens, distinct = sum(map(len, rows)), len({tuple(row[: n + 1]) for row in rows for n in range(len(row))})
    if least == 1:
        assert tree.tokens == (distinct if tokens - distinct >= LEAST_SHARE * tokens else tokens)
    tree = tree.behind(virtual)
    stored = np.full(tree.tokens, -2)
    for row, places in zip(rows, tree.of_sequences, strict=True):
        own = [-1] * virtual + row
        assert tree.positions[places].tolist() == list(range(len(own)))
        assert all(there in (-2, token) for there, token in zip(stored[places], own, strict=True))
        stored[places] = own
    assert (stored > -2).all()
    for number, span in enumerate(tree.spans):
        assert [number in path for path in tree.paths] == [number <= i < span.end for i in range(len(tree.spans))]
        first = tree.offsets[number]
        assert (
            stored[first : first + span.length].tolist()
            == ([-1] * virtual + rows[span.row])[span.start : span.start + span.length]
        )


def test_what_saves_little_is_not_shared() -> None:
    def found(*rows: list[int]) -> Beginnings | None:
        return find_beginnings([np.asarray(row, np.int32).tobytes() for row in rows], 4)

    top = list(range(LEAST_SAVED))
    assert found([*top, 1], [*top, 2]) is not None
    assert found([*top[:-1], 91], [*top[:-1], 92]) is None
    assert found([*top, *[1] * 600], [*top, *[2] * 600]) is None  # a hundredth of all tokens
    assert found(top) is None


LAYERS = st.tuples(
    st.sampled_from([1, 2, 4]),  # key heads, beside four query heads
    st.sampled_from([0, 3]),  # prefix
    st.booleans(),  # bias
    st.sampled_from([None, 4]),  # window
)


@settings(max_examples=30, deadline=None)
@given(texts(), st.sampled_from([1, 5]), st.sampled_from([0, 2]), LAYERS, st.integers(0, 2**31))
def test_attention_over_a_tree_is_that_of_its_sequences(
    rows: list[list[int]], least: int, virtual: int, layer: tuple[int, int, bool, int | None], seed: int
) -> None:
    torch.manual_seed(seed)
    (G, P, biased, window), (H, K) = layer, (4, 8)
    tree = tree_of(rows, least).behind(virtual)
    lengths = tuple(len(row) + virtual for row in rows)
    layout, apart = (Layout.of(lengths, max(lengths), CPU, one) for one in (tree, None))
    T, places = tree.tokens, torch.from_numpy(np.concatenate(tree.of_sequences))
    first = torch.tensor([places.tolist().index(i) for i in range(T)])
    q, k, v = (torch.randn(1, *shape, K, dtype=torch.float64) for shape in ((H, T), (G, P + T), (G, P + T)))
    bias = torch.randn(H, P + max(lengths), dtype=torch.float64) if biased else None
    weight = torch.randn(1, T, H, K, dtype=torch.float64)

    def run(impl: Any, layout: Layout, dtype: torch.dtype) -> list[Tensor]:
        own = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        read = own
        if layout.tree is None:
            read = [torch.cat([x[:, :, :p], x[:, :, p:][:, :, places]], 2) for x, p in zip(own, (0, P, P), strict=True)]
        out = packed_attention(
            *read, layout, scaling=0.4, causal=True, window=window, impl=impl,
            bias_HN=None if bias is None else bias.to(dtype),
        )  # fmt: skip
        out = out[:, first] if layout.tree is None else out
        (out * weight.to(dtype)).sum().backward()
        return [out.detach(), *(x.grad for x in own if x.grad is not None)]

    expected = run("reference", apart, torch.float64)
    for impl in ("reference", "products", "sdpa", "expanded", "auto"):
        for dtype in (torch.float64, torch.float32):
            for found, right in zip(run(impl, layout, dtype), expected, strict=True):
                assert_close(found, right.to(dtype), scale=max(1.0, float(right.abs().max())), what=impl)


@pytest.mark.parametrize("impl", ["products", "sdpa", "expanded"])
def test_in_bf16_it_is_as_exact_as_apart(impl: Any) -> None:
    torch.manual_seed(0)
    rows = [[1] * 40 + [i] * (30 + i) for i in range(2, 6)]
    tree, lengths = tree_of(rows, 16), tuple(map(len, rows))
    layout, apart = (Layout.of(lengths, max(lengths), CPU, one) for one in (tree, None))
    places = torch.from_numpy(np.concatenate(tree.of_sequences))
    first = torch.tensor([places.tolist().index(i) for i in range(tree.tokens)])
    q, k, v = (torch.randn(1, 2, tree.tokens, 16).bfloat16().double() for _ in range(3))

    def run(layout: Layout, dtype: torch.dtype, impl: Any) -> list[Tensor]:
        own = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        read = own if layout.tree is not None else [x[:, :, places] for x in own]
        out = packed_attention(*read, layout, scaling=0.25, causal=True, impl=impl)
        out = out if layout.tree is not None else out[:, first]
        out.float().square().sum().backward()
        return [out.detach(), *(x.grad for x in own if x.grad is not None)]

    right = run(apart, torch.float64, "reference")
    for found in (run(apart, torch.bfloat16, "auto"), run(layout, torch.bfloat16, impl)):
        for one, true in zip(found, right, strict=True):  # scores, probabilities, output and the sum over sequences
            assert_close(one, true, roundings=4, what=impl)


@pytest.mark.parametrize("impl", ["auto", "products", "sdpa", "expanded", "reference"])
def test_under_autocast_it_computes_in_half(impl: Any) -> None:
    """Where a rotation has made fp32 of q and k, but not of v."""
    torch.manual_seed(0)
    rows = [[1] * 60 + [i] * 50 for i in range(2, 5)]  # longer than what fp32 computes by products
    tree = tree_of(rows, 16)
    layout = Layout.of(tuple(map(len, rows)), 110, CPU, tree)
    q, k, v = (torch.randn(1, 2, tree.tokens, 16).bfloat16() for _ in range(3))

    def run(*own: Tensor) -> list[Tensor]:
        read = [x.clone().requires_grad_() for x in own]
        with torch.autocast("cpu", torch.bfloat16, enabled=own[0].dtype != own[2].dtype):
            out = packed_attention(*read, layout, scaling=0.25, causal=True, impl=impl)
        out.float().square().sum().backward()
        return [out, *(x.grad for x in read if x.grad is not None)]

    for found, expected in zip(run(q.float(), k.float(), v), run(q, k, v), strict=True):
        assert torch.equal(found.to(expected.dtype), expected)


def test_packing_and_back() -> None:
    rows = [[1, 2, 3, 4], [1, 2, 5], [6], [1, 2]]
    tree, lengths = tree_of(rows, 1), tuple(map(len, rows))
    layout = Layout.of(lengths, 4, CPU, tree)
    padded = torch.tensor([row + [0] * (4 - len(row)) for row in rows]).double().unsqueeze(-1).requires_grad_()
    packed = layout.pack(padded)
    assert packed.shape == (1, 6, 1) and torch.equal(layout.unpack(packed), padded)
    assert torch.equal(layout.join(layout.by_sequence(packed)), packed)
    places = layout.places
    assert torch.equal(packed[0, places[1, 2]], torch.tensor([5.0]).double())
    layout.unpack(packed).sum().backward()
    assert padded.grad is not None and padded.grad.sum() == sum(lengths)  # of a shared token, all in one row
