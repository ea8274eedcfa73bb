"""LoftQ: LoRA-Fine-Tuning-aware Quantization (Li et al., 2023, arXiv:2310.08659), an initialization of LoRA.

    W' = quantized(W - B A),  B A = the best approximation of W - W' of rank R, alternately

W' is computed with as it is: a base model that is quantized to these bits afterwards has it exactly.

Shapes: W (O, I), A (R, I), B (O, R); of an embedding V rows of the table and D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from siliang.language import Bilingual
from siliang.methods.lora_initialization import Factors
from siliang.secrets import short_repr
from siliang.types import ConfigError

MOST_ROUNDS = 100  # of the iterations; the paper has 5


def complete(given: dict[str, int]) -> dict[str, int]:
    """The settings with PEFT's defaults.

    Raises:
        ConfigError: A value is not allowed.
    """
    settings = {"loftq_bits": 4, "loftq_iter": 1} | given
    bits, rounds = settings["loftq_bits"], settings["loftq_iter"]
    if bits not in (4, 8) or type(rounds) is not int or not 1 <= rounds <= MOST_ROUNDS:
        raise ConfigError(
            Bilingual(
                f"loftq_config = {short_repr(settings)}: loftq_bits is 4 or 8, loftq_iter 1 to {MOST_ROUNDS}.",
                f"loftq_config = {short_repr(settings)}：loftq_bits 为 4 或 8，loftq_iter 为 1 到 {MOST_ROUNDS}。",
            )
        )
    return settings


def options(settings: dict[str, int]) -> dict[str, int]:
    """The settings as `loftq` takes them."""
    return {"bits": settings["loftq_bits"], "iterations": settings["loftq_iter"]}


def loftq(W_OI: Tensor, r: int, scaling: float, *, bits: int, iterations: int) -> Factors:
    """A, B and W'.

    Args:
        bits: 4 (NF4) or 8 (int8).

    Raises:
        ConfigError: bitsandbytes is not there.
    """
    A, B = W_OI.new_zeros(r, W_OI.shape[1]), W_OI.new_zeros(W_OI.shape[0], r)
    quantized = W_OI
    for _ in range(iterations):
        quantized = _quantized(W_OI - B @ A, bits)
        U, S, Vh = torch.linalg.svd(W_OI - quantized, full_matrices=False)
        A, B = S[:r, None].sqrt() * Vh[:r], U[:, :r] * S[:r].sqrt()
    return Factors(A.contiguous(), B.contiguous(), quantized)


def loftq_of_table(W_VD: Tensor, r: int, scaling: float, *, bits: int, iterations: int) -> Factors:
    """A (R, V), B (D, R) and W' (V, D) of an embedding: its rows are quantized as they are stored."""
    found = loftq(W_VD, r, scaling, bits=bits, iterations=iterations)
    assert found.B is not None
    return Factors(found.B.T.contiguous(), found.A.T.contiguous(), found.W)


def _quantized(W: Tensor, bits: int) -> Tensor:
    """W quantized to NF4 or int8 and dequantized."""
    try:
        from bitsandbytes import functional
    except ImportError:
        raise ConfigError(
            Bilingual(
                "init_lora_weights = 'loftq' needs bitsandbytes, which is not installed: pip install 'siliang[cuda]'.",
                "init_lora_weights = 'loftq' 需要 bitsandbytes，而它没有安装：pip install 'siliang[cuda]'。",
            )
        ) from None
    if bits == 4:
        return functional.dequantize_4bit(*functional.quantize_4bit(W.contiguous(), quant_type="nf4"))
    values, scale, _ = functional.int8_vectorwise_quant(W.half())
    return functional.int8_vectorwise_dequant(values, scale)
