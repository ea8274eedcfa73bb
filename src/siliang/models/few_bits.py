"""Weights in few bits, as bitsandbytes holds them."""

from __future__ import annotations

from torch import nn

MAY_PACK = "support_avx512bf16_for_cpu"


def keep_as_stored(model: nn.Module) -> None:
    """Forbids bitsandbytes (0.50) to pack 4-bit weights anew on CPUs with AVX512-BF16.

    It would do so in the first forward pass in eval mode: scales become bf16, so that the base is another one than
    before, and training that goes on behind an evaluation has no gradient for what lies below a packed layer.
    """
    for module in model.modules():
        if hasattr(module, MAY_PACK):
            setattr(module, MAY_PACK, False)
