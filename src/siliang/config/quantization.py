"""The settings of a quantized base model."""

from __future__ import annotations

from typing import Literal

from siliang.config.section import Section


class QuantizationConfig(Section):
    """Quantization of the base model's linear layers, as in QLoRA. Needs bitsandbytes."""

    bits: Literal[4, 8] = 4
    """The bits of a quantized weight: 4 or 8.

    量化后每个权重的位数：4 或 8。"""
    type: Literal["nf4", "fp4"] = "nf4"
    """The data type of 4 bits: nf4 suits weights, which are nearly normally distributed.

    4 位的数据类型：nf4 适合权重，因为权重接近正态分布。"""
    double: bool = True
    """Quantize the scales, too: saves 0.4 bits per parameter.

    缩放系数也量化：每个参数再省 0.4 位。"""
    compute_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """The number format in which weights are dequantized and multiplied. auto: bf16 if the hardware supports it, fp16
    on older GPUs.

    权重反量化并相乘时的数值格式。auto：硬件支持时用 bf16，较旧的 GPU 用 fp16。"""
