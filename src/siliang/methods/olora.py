"""OLoRA: Orthonormal Low-Rank Adaptation (Büyükakyüz, 2024, arXiv:2406.01775), an initialization of LoRA.

    W = Q R        A = R_R,  B = Q_R,  W' = W - s B A

Shapes: W (O, I), A (R, I), B (O, R).
"""

from __future__ import annotations

import torch
from torch import Tensor

from siliang.methods.lora_initialization import Factors


def olora(W_OI: Tensor, r: int, scaling: float) -> Factors:
    """A, B and W'."""
    Q, R = torch.linalg.qr(W_OI)
    A, B = R[:r].contiguous(), Q[:, :r].contiguous()
    return Factors(A, B, W_OI - scaling * (B @ A))
