"""Weights in few bits, as bitsandbytes holds them."""

from __future__ import annotations

from torch import nn

from siliang.types import ModelError

IN_FEW_BITS = ("Linear8bitLt", "Linear4bit")
MAY_PACK = "support_avx512bf16_for_cpu"


def check_few_bits(model: nn.Module, source: str) -> None:
    """The layers that a model's config says to be in few bits are.

    Args:
        source: What the model is called, for the error.

    Raises:
        ModelError: One holds a plain weight.
    """
    for path, module in model.named_modules():
        if type(module).__name__ in IN_FEW_BITS and type(module.weight) is nn.Parameter:
            raise ModelError(
                f"{source}: its config.json says that its weights are quantized, and {path} is not. Take "
                "quantization_config out of it, or take the files that belong to it."
            )


def keep_as_stored(model: nn.Module) -> None:
    """Forbids bitsandbytes (0.50) to pack 4-bit weights anew on CPUs with AVX512-BF16.

    It would do so in the first forward pass in eval mode: scales become bf16, so that the base is another one than
    before, and training that goes on behind an evaluation has no gradient for what lies below a packed layer.
    """
    for module in model.modules():
        if hasattr(module, MAY_PACK):
            setattr(module, MAY_PACK, False)
