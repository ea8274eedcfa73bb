"""Attention of the tokens that are read, beside a mask over all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_all_close, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from siliang.data.batch import tree_of
from siliang.ops.layout import Layout
from siliang.ops.packed_attention import packed_attention
from siliang.ops.read_attention import ReadLayout, read_attention
from tests.ops.test_ops import by_number, heads, results

LENGTHS = (7, 1, 12, 3)
READ = {"one of each": [0, 7, 19, 20], "some of each": [2, 5, 7, 8, 9, 15, 19, 22], "none of some": [3, 4, 6, 10]}


def layout_of(lengths: tuple[int, ...], rows: list[int]) -> ReadLayout:
    whole = Layout.of(lengths, max(lengths), torch.device("cpu"))
    ends = [start + n for start, n in zip(whole.starts, lengths, strict=True)]
    counts = [sum(start <= row < end for row in rows) for start, end in zip(whole.starts, ends, strict=True)]
    places = torch.tensor(rows)
    return ReadLayout(tuple(counts), whole.width, whole.index[places], whole=whole, rows=places)


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("extra", ["", "grouped", "prefix", "bias", "window", "all"])
@pytest.mark.parametrize("impl", ["products", "sdpa", "one", "auto"])
def test_read_attention(read: str, causal: bool, extra: str, impl: str) -> None:
    if impl == "one" and read != "one of each":
        pytest.skip("for one query of each sequence")
    torch.manual_seed(0)
    layout, T, H, K = layout_of(LENGTHS, READ[read]), sum(LENGTHS), 4, 8
    P = 3 if extra in ("prefix", "all") else 0
    G = 2 if extra in ("grouped", "all") else H
    bias = torch.randn(H, P + max(LENGTHS)) if extra in ("bias", "all") else None
    window = 4 if extra in ("window", "all") and causal else None

    def go(impl: Any) -> Callable[..., Tensor]:
        return lambda q, k, v: read_attention(
            q, k, v, layout, scaling=K**-0.5, causal=causal, bias_HN=bias, window=window, impl=impl
        )

    tensors = [heads(len(READ[read]), H, K), heads(T, G, K, prefix=P), heads(T, G, K, prefix=P)]
    ours, theirs = (results(go(way), tensors, torch.float32) for way in (impl, "reference"))
    assert_all_close(by_number(ours), by_number(theirs))
    # few queries reach a key, and most gradients are next to nothing: the errors of low precision are taken together
    truth = results(go("reference"), tensors, torch.float64)
    for low in (torch.bfloat16, torch.float16):
        for found, naive, true in zip(*(results(go(i), tensors, low) for i in (impl, "reference")), truth, strict=True):
            off, theirs_off = (float((x.double() - true).norm()) for x in (found, naive))
            assert off <= 2 * theirs_off + torch.finfo(low).eps * float(true.norm())


def test_a_shared_token_gets_the_exact_sum_of_its_gradients() -> None:
    """In bf16, where 256 + 1 is 256: more sequences than that begin with the token that is read in each."""
    S = 400
    inputs = {"input_ids": torch.tensor([[*range(20), i] for i in range(S)])}
    tree = tree_of(inputs, [21] * S)
    whole = Layout.of((21,) * S, 21, torch.device("cpu"), tree)
    rows = torch.tensor([of[3] for of in whole.of_sequences])
    layout = ReadLayout((1,) * S, 21, torch.arange(S) * 21 + 3, whole=whole, rows=rows, alone=False)
    x = torch.randn(1, whole.tokens, 2).bfloat16().requires_grad_()
    layout.select(x).sum().backward()
    assert x.grad is not None and x.grad[0, rows[0]].tolist() == [S, S]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_it_is_the_part_of_the_whole_attention(data: st.DataObject) -> None:
    lengths = tuple(data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=6)))
    T = sum(lengths)
    rows = sorted(data.draw(st.sets(st.integers(0, T - 1), min_size=1)))
    causal = data.draw(st.booleans())
    torch.manual_seed(0)
    layout = layout_of(lengths, rows)
    q, k, v = (heads(T, 2, 4) for _ in range(3))
    whole = packed_attention(q, k, v, layout.whole, scaling=0.5, causal=causal)
    found = read_attention(q[:, :, rows], k, v, layout, scaling=0.5, causal=causal)
    assert_close(found, whole[:, rows])
