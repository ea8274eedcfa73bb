"""The orthogonal initialization of LoRA (Datta, https://datta0.github.io/posts/rethink-lora-init/).

    A = Q_1^T N_1 / 10,  B = N_2 Q_2 / 10        B A = 0, and neither is 0

Q_1 and Q_2 are every other row of an orthogonal matrix, N_1 and N_2 normal.

Shapes: W (O, I), A (R, I), B (O, R), Q_1 and Q_2 (R/2, R), N_1 (R/2, I), N_2 (O, R/2).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from siliang.language import Bilingual
from siliang.methods.lora_initialization import Factors
from siliang.types import ConfigError


def orthogonal(W_OI: Tensor, r: int, scaling: float) -> Factors:
    """A and B, in fp32.

    Raises:
        ConfigError: r is odd.
    """
    check_even([r])
    (out_features, in_features), device = W_OI.shape, W_OI.device
    Q, _ = torch.linalg.qr(torch.randn(r, r, device=device))
    A = (torch.randn(in_features, r // 2, device=device) @ Q[0::2]).T / 10.0
    B = torch.randn(r // 2, out_features, device=device).T @ Q[1::2] / 10.0
    return Factors(A.contiguous(), B.contiguous())


def check_even(ranks: Iterable[int]) -> None:
    """
    Raises:
        ConfigError: A rank is odd, of which there are no halves.
    """
    for r in ranks:
        if r % 2:
            raise ConfigError(
                Bilingual(
                    f"init_lora_weights = 'orthogonal' with r = {r}: each layer's r must be even.",
                    f"init_lora_weights = 'orthogonal' 而 r = {r}：每层的 r 须为偶数。",
                )
            )
