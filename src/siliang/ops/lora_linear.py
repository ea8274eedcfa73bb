"""y + scaling * (dropout(x) A^T) B^T: what LoRA adds to a linear layer's output.

Shapes: B any leading dimensions, I features in, O features out, R rank.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def lora_linear(
    y_BO: Tensor,
    x_BI: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    scaling: float,
    *,
    bias_O: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Adds the low-rank update of `x_BI` to the base layer's output `y_BO`.

    A and B may be wider than x (fp32 beside bf16): they are cast down, which touches R * (I + O) numbers, rather
    than x up, which would copy every activation (PEFT issue 2421).

    Returns:
        (..., O), in the dtype of `y_BO`.
    """
    x_BI = F.dropout(x_BI, dropout_p, training)
    bias_O = None if bias_O is None else bias_O.to(x_BI.dtype)
    update_BO = F.linear(F.linear(x_BI, A_RI.to(x_BI.dtype)), B_OR.to(x_BI.dtype), bias_O)
    return y_BO + (scaling * update_BO).to(y_BO.dtype)
