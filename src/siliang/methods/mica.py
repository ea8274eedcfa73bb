"""MiCA (arXiv:2604.01694), an initialization of LoRA that trains A alone.

    W = U S V^T        A = 0,  B = the last R columns of U, which is not trained

Shapes: W (O, I), A (R, I), B (O, R); of an embedding V rows of the table and D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from siliang.methods.lora_initialization import Factors


def mica(W_OI: Tensor, r: int, scaling: float) -> Factors:
    """A, and in B the left singular vectors of the smallest singular values."""
    U, _, _ = torch.linalg.svd(W_OI, full_matrices=False)
    return Factors(W_OI.new_zeros(r, W_OI.shape[1]), U[:, -r:].contiguous())


def mica_of_table(W_VD: Tensor, r: int, scaling: float) -> Factors:
    """The same of an embedding, which is a linear layer of the weight W^T: A (R, V), B (D, R)."""
    return mica(W_VD.T, r, scaling)
