"""Attention of one new token of each row to keys that all rows share, and to its own.

    out_b = softmax(scaling * q_b [K_0 ; K_b]^T) [V_0 ; V_b]

The scores of the shared keys are one product of all rows' queries, and no row copies these keys.

Shapes: B rows, H query heads, G key and value heads, R = H / G, C shared keys, N own keys, K head size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def attention_to_shared(
    q_BH1K: Tensor,
    k_BGNK: Tensor,
    v_BGNK: Tensor,
    k_1GCK: Tensor,
    v_1GCK: Tensor,
    mask: Tensor | None = None,
    *,
    scaling: float,
    impl: Literal["parts", "reference"] = "parts",
) -> Tensor:
    """
    Args:
        mask: The keys that a row sees, boolean, (B, 1, 1, C + N); all the shared ones. None: it sees all.

    Returns:
        (B, 1, H, K).
    """
    (B, H, _, K), G, C = q_BH1K.shape, k_BGNK.shape[1], k_1GCK.shape[2]
    if impl == "reference":
        k, v = (torch.cat([x.expand(B, -1, -1, -1), y], 2) for x, y in ((k_1GCK, k_BGNK), (v_1GCK, v_BGNK)))
        k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
        scores = scaling * q_BH1K @ k.mT
        scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2)
    exact = torch.promote_types(q_BH1K.dtype, torch.float32)  # of the scores: 100 is off by up to 0.25 in bf16
    with torch.autocast(q_BH1K.device.type, enabled=False):  # which would compute these products in bf16
        q_BGRK = (q_BH1K.to(exact) * scaling).reshape(B, G, H // G, K)
        shared_BGRC = _by_row(_by_head(q_BGRK) @ k_1GCK[0].to(exact).mT, B)
        own_BGRN = q_BGRK @ k_BGNK.to(exact).mT
    if mask is not None:
        own_BGRN = own_BGRN.masked_fill(~mask[..., C:], float("-inf"))
    p = torch.cat([shared_BGRC, own_BGRN], -1).softmax(-1).to(v_BGNK.dtype)
    out_BGRK = _by_row(_by_head(p[..., :C]) @ v_1GCK[0], B) + p[..., C:] @ v_BGNK
    return out_BGRK.reshape(B, 1, H, K)


def _by_head(x_BGRN: Tensor) -> Tensor:
    """(B, G, R, n) to (G, B R, n)."""
    return x_BGRN.transpose(0, 1).flatten(1, 2)


def _by_row(x_GMN: Tensor, B: int) -> Tensor:
    """(G, B R, n) to (B, G, R, n)."""
    return x_GMN.unflatten(1, (B, -1)).transpose(0, 1)
