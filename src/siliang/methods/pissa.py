"""PiSSA: Principal Singular values and Singular vectors Adaptation (Meng et al., 2024, arXiv:2404.02948), an
initialization of LoRA.

    W = U S V^T        A = sqrt(S_R / s) V_R^T,  B = U_R sqrt(S_R / s),  W' = W - s B A

"pissa_niter_N": the R largest singular values by N rounds of a randomized decomposition, which is faster.

Shapes: W (O, I), A (R, I), B (O, R).
"""

from __future__ import annotations

import torch
from torch import Tensor

from siliang.methods.lora_initialization import Factors


def pissa(W_OI: Tensor, r: int, scaling: float) -> Factors:
    """A, B and W'."""
    U, S, Vh = torch.linalg.svd(W_OI, full_matrices=False)
    return _taken_out(W_OI, U[:, :r], S[:r], Vh[:r], scaling)


def pissa_niter(W_OI: Tensor, r: int, scaling: float, *, iterations: int) -> Factors:
    """The same, nearly."""
    U, S, V = torch.svd_lowrank(W_OI, r, niter=iterations)
    return _taken_out(W_OI, U[:, :r], S[:r], V.T[:r], scaling)


def _taken_out(W_OI: Tensor, U_OR: Tensor, S_R: Tensor, Vh_RI: Tensor, scaling: float) -> Factors:
    root = (S_R / scaling).sqrt()
    A, B = (root[:, None] * Vh_RI).contiguous(), (U_OR * root).contiguous()
    return Factors(A, B, W_OI - scaling * (B @ A))
