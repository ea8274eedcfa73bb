"""Attention to shared and own keys: the parts are the plain attention's."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from siliang.ops.shared_keys import attention_to_shared


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float64, False), (torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
)
@pytest.mark.parametrize("scaling", [0.3, 30.0])
def test_parts_are_the_plain_attention(
    heads: int, groups: int, padded: bool, dtype: torch.dtype, scaling: float, autocast: bool
) -> None:
    """Also of large scores, which bf16 would round by up to a half."""
    g = torch.Generator().manual_seed(0)
    B, C, N, K = 5, 11, 7, 8

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    q, k, v = some(B, 1, heads, K).transpose(1, 2), some(B, groups, N, K), some(B, groups, N, K)
    shared = some(1, groups, C, K), some(1, groups, C, K)
    mask = torch.ones(B, 1, 1, C + N, dtype=torch.bool)
    for row in range(B if padded else 0):
        mask[row, ..., C : C + row] = False
    options = {"mask": mask if padded else None, "scaling": scaling}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attention_to_shared(q, k, v, *shared, **options)  # type: ignore[arg-type]
    exact = [x.double() for x in (q, k, v, *shared)]
    expected = attention_to_shared(*exact, **options, impl="reference")  # type: ignore[arg-type]
    assert found.shape == (B, 1, heads, K) and found.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    if dtype != torch.bfloat16:
        tolerance = max(tolerance, 240 * torch.finfo(dtype).eps * scaling / 30)  # a rounding of the largest score
    assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
