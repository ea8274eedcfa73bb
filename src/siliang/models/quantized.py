"""4-bit and 8-bit weights of bitsandbytes (0.50). Only this file knows its layers and their fields.

A 4-bit weight carries a `quant_state` (scales, shape, format), an 8-bit one its scales as `SCB`.

Shapes: O features out, I features in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.models.introspect import out_by_in
from siliang.ops.stored import as_kept
from siliang.types import ModelError

LAYERS = ("Linear8bitLt", "Linear4bit")
MAY_PACK = "support_avx512bf16_for_cpu"
NF4_BLOCK = 64  # weights per scale
SCALE_BLOCK = 256  # scales per second-level scale (double quantization)


def is_quantized(layer: nn.Module) -> bool:
    """Whether the layer's weight is stored in 4 or 8 bits."""
    weight = getattr(layer, "weight", None)
    return hasattr(weight, "quant_state") or hasattr(weight, "SCB")


def float_weight(layer: Any) -> Tensor:
    """The layer's weight in floating point, dequantized if necessary, as (O, I)."""
    weight: Any = layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "SCB"):
        from bitsandbytes.functional import int8_vectorwise_dequant

        scale = layer.state.SCB if weight.SCB is None else weight.SCB
        return int8_vectorwise_dequant(weight.data, scale)
    return out_by_in(layer, weight)


def count_numbers(p: Tensor) -> int:
    """The number of weights of a parameter: a 4-bit parameter has two per byte."""
    state = getattr(p, "quant_state", None)
    return p.numel() if state is None else state.shape.numel()


def check_quantized(model: nn.Module, source: str) -> None:
    """Checks that the layers which the model's config declares as quantized are quantized.

    Args:
        source: The name of the model, for the error.

    Raises:
        ModelError: A layer has a plain weight.
    """
    for path, module in model.named_modules():
        if type(module).__name__ in LAYERS and type(module.weight) is nn.Parameter:
            raise ModelError(
                Bilingual(
                    f"{source}: its config.json says that its weights are quantized, and {path} is not. Take "
                    "quantization_config out of it, or take the files that belong to it.",
                    f"{source}：config.json 说权重已量化，而 {path} 没有。请去掉其中的 quantization_config，"
                    "或使用配套的文件。",
                )
            )


def keep_as_stored(model: nn.Module) -> None:
    """Prevents bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    It would do so in the first forward pass in eval mode. The scales then become bf16, which changes the base model,
    and training after an evaluation has no gradient below a repacked layer.
    """
    for module in model.modules():
        if hasattr(module, MAY_PACK):
            setattr(module, MAY_PACK, False)


def keep_states(model: nn.Module) -> None:
    """Sets the quant_state of each 4-bit layer's weight: a weight gathered from shards has lost it."""
    for module in model.modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            module.quant_state, module.quant_storage = state, module.weight.dtype  # type: ignore[assignment,union-attr]


def quantized_sizes(model: nn.Module) -> list[int]:
    """The number of weights of each quantized parameter."""
    weights = [w for w in (getattr(module, "weight", None) for module in model.modules()) if isinstance(w, Tensor)]
    states = [state for state in (getattr(w, "quant_state", None) for w in weights) if state is not None]
    return [math.prod(state.shape) for state in states] + [w.numel() for w in weights if w.dtype == torch.int8]


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and the scales of quantized weights, which are neither."""
    for p in model.parameters():
        yield as_kept(p)
        for name in ("CB", "SCB"):
            if isinstance(getattr(p, name, None), Tensor):
                yield getattr(p, name)
    for module in model.modules():  # the layers have the state, too: a sharded weight has lost it
        state = getattr(getattr(module, "weight", None), "quant_state", None) or getattr(module, "quant_state", None)
        for one in (state, getattr(state, "state2", None)):
            if one is not None:
                yield from (x for x in (one.absmax, one.code, one.offset) if isinstance(x, Tensor))
    yield from model.buffers()


def empty_quantized(
    layer: nn.Linear,
    *,
    bits: int,
    kind: str,
    double: bool,
    compute_dtype: torch.dtype,
    storage: torch.dtype,
) -> nn.Module:
    """A bitsandbytes layer of this size with plain, uninitialized parameters. These can be fake tensors, unlike
    bitsandbytes' parameter classes.

    Args:
        kind: The 4-bit data type: nf4 or fp4.
        double: Whether the scales of 4-bit weights are quantized, too.
        compute_dtype: The dtype in which 4-bit weights are dequantized and multiplied.
        storage: The dtype of the tensors that store 4-bit weights.
    """
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState

    library: Any = bnb
    new_class = library.nn.Linear4bit if bits == 4 else library.nn.Linear8bitLt
    new: Any = new_class.__new__(new_class)
    nn.Module.__init__(new)
    new.in_features, new.out_features = layer.in_features, layer.out_features
    new.bias = None if layer.bias is None else nn.Parameter(torch.empty_like(layer.bias), requires_grad=False)
    if bits == 8:
        weight: Any = nn.Parameter(torch.empty(layer.weight.shape, dtype=torch.int8), requires_grad=False)
        weight.CB, weight.SCB = weight.data, torch.empty(layer.out_features)
        new.state, new.index = library.MatmulLtState(), None
        new.state.threshold, new.state.has_fp16_weights = 6.0, False
    else:
        n = layer.weight.numel()
        blocks = -(-n // NF4_BLOCK)
        weight = nn.Parameter(torch.empty(-(-n // 2) // storage.itemsize, 1, dtype=storage), requires_grad=False)
        weight.quant_state = QuantState(
            absmax=torch.empty(blocks, dtype=torch.uint8 if double else torch.float32),
            shape=layer.weight.shape,
            dtype=layer.weight.dtype,
            blocksize=NF4_BLOCK,
            code=torch.empty(16),
            quant_type=kind,
            offset=torch.empty(()) if double else None,
            state2=QuantState(
                absmax=torch.empty(-(-blocks // SCALE_BLOCK)),
                code=torch.empty(256),
                blocksize=SCALE_BLOCK,
                dtype=torch.float32,
            )
            if double
            else None,
        )
        new.quant_state, new.quant_storage = weight.quant_state, storage
        # a weight gathered from shards has lost its state, and bitsandbytes would create its own class of parameter
        new.register_forward_pre_hook(lambda layer, args: setattr(layer.weight, "quant_state", layer.quant_state))
        new.compute_dtype, new.compute_type_is_set = compute_dtype, True
        setattr(new, MAY_PACK, False)
    new.weight = weight
    return new.requires_grad_(False)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters of a model. Shared ones count once, 4-bit ones by their number of weights."""
    sizes = [(count_numbers(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)
