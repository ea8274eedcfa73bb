"""Base models on paper: fake tensors of the right shapes and formats, with no bytes behind them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights
from transformers.quantizers.quantizers_utils import should_convert_module

from siliang.config import QuantizationConfig
from siliang.engine.batches import Batch
from siliang.models.load import DEALT_AS, MISFITS, kept_whole, model_from_config
from siliang.types import ModelError, TaskType, first_line

NF4_BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share one, where they are quantised too


@contextmanager
def on_paper() -> Iterator[FakeTensorMode]:
    """Within the block every new tensor is fake, and no initialiser runs."""
    with warnings.catch_warnings():
        # torch's own deepcopy of a tensor asks for its address
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, no_init_weights():
            yield mode


def draw_base(
    config: Any,
    task: TaskType,
    *,
    dtype: torch.dtype,
    quantization: QuantizationConfig | None = None,
    to_be_dealt: bool = False,
    compute_dtype: torch.dtype = torch.float32,
    attention: str | None = None,
) -> Any:
    """A base model of this config, in eval mode; within `on_paper`.

    Args:
        dtype: Of the weights, or of those that are not quantised.
        to_be_dealt: As for `load_model`.
        compute_dtype: What a quantised weight becomes to be multiplied.
        attention: transformers' attn_implementation; None for its own choice.

    Raises:
        ModelError: transformers has no model of this kind for the task, or the config is not whole.
    """
    chosen = {"attn_implementation": attention} if attention else {}
    try:
        model = model_from_config(config, task, dtype=dtype, **chosen)
    except MISFITS as error:
        why = first_line(error, kind=True)
        raise ModelError(f"a {config.model_type} cannot be made for {task.lower()} from its config: {why}") from None
    model.tie_weights()  # which transformers does with the initialising that is left out
    _keep_wide(model, dtype)
    if quantization is not None:
        kept = [*kept_whole(task), *(getattr(model, "_keep_in_fp32_modules", None) or [])]
        _quantise(model, quantization, kept, compute_dtype, DEALT_AS if to_be_dealt else torch.uint8)
    return model.eval()


def to_paper(mode: FakeTensorMode, batch: Batch) -> Batch:
    """The same batch of fake tensors."""
    inputs: dict[str, Tensor] = {name: mode.from_tensor(x) for name, x in batch.inputs.items()}
    targets = None if batch.targets is None else mode.from_tensor(batch.targets)
    return Batch(inputs, batch.lengths, batch.weight, batch.keys, targets)


def _keep_wide(model: Any, dtype: torch.dtype) -> None:
    """As from_pretrained does: some models name parts that stay fp32 in half precision."""
    names = list(getattr(model, "_keep_in_fp32_modules_strict", None) or [])
    if dtype is torch.float16:
        names += getattr(model, "_keep_in_fp32_modules", None) or []
    if dtype is torch.float32 or not names:
        return
    for path, module in model.named_modules():
        if set(path.split(".")) & set(names):
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=torch.float32)))


def _quantise(
    model: nn.Module, wanted: QuantizationConfig, kept: list[str], compute_dtype: torch.dtype, storage: torch.dtype
) -> None:
    """Puts bitsandbytes' layers in place of the linear ones, as they are once the weights are loaded."""
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or not should_convert_module(path, kept):
            continue
        parent = model.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rpartition(".")[2], _quantised(module, wanted, compute_dtype, storage))


def _quantised(
    layer: nn.Linear, wanted: QuantizationConfig, compute_dtype: torch.dtype, storage: torch.dtype
) -> nn.Module:
    """bitsandbytes' own layer, which computes as ever, around plain parameters: its own kinds cannot be fake."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState

    library: Any = bnb
    kind = library.nn.Linear4bit if wanted.bits == 4 else library.nn.Linear8bitLt
    new: Any = kind.__new__(kind)
    nn.Module.__init__(new)
    new.in_features, new.out_features = layer.in_features, layer.out_features
    new.bias = None if layer.bias is None else nn.Parameter(torch.empty_like(layer.bias), requires_grad=False)
    if wanted.bits == 8:
        weight: Any = nn.Parameter(torch.empty(layer.weight.shape, dtype=torch.int8), requires_grad=False)
        weight.CB, weight.SCB = weight.data, torch.empty(layer.out_features)
        new.state, new.index = library.MatmulLtState(), None
        new.state.threshold, new.state.has_fp16_weights = 6.0, False
    else:
        n = layer.weight.numel()
        blocks = -(-n // NF4_BLOCK)
        weight = nn.Parameter(torch.empty(-(-n // 2) // storage.itemsize, 1, dtype=storage), requires_grad=False)
        scales = torch.uint8 if wanted.double else torch.float32
        weight.quant_state = QuantState(
            absmax=torch.empty(blocks, dtype=scales),
            shape=layer.weight.shape,
            dtype=layer.weight.dtype,
            blocksize=NF4_BLOCK,
            code=torch.empty(16),
            quant_type=wanted.type,
            offset=torch.empty(()) if wanted.double else None,
            state2=QuantState(
                absmax=torch.empty(-(-blocks // SCALE_BLOCK)),
                code=torch.empty(256),
                blocksize=SCALE_BLOCK,
                dtype=torch.float32,
            )
            if wanted.double
            else None,
        )
        new.quant_state, new.quant_storage = weight.quant_state, storage
        # what comes back from being dealt out has lost it, and bitsandbytes would make its own kind again
        new.register_forward_pre_hook(lambda layer, args: setattr(layer.weight, "quant_state", layer.quant_state))
        new.compute_dtype, new.compute_type_is_set = compute_dtype, True
        new.support_avx512bf16_for_cpu = False
    new.weight = weight
    return new.requires_grad_(False)


def quantised_sizes(model: nn.Module) -> list[int]:
    """Numbers of each quantised weight."""
    weights = [w for w in (getattr(module, "weight", None) for module in model.modules()) if isinstance(w, Tensor)]
    states = [state for state in (getattr(w, "quant_state", None) for w in weights) if state is not None]
    return [math.prod(state.shape) for state in states] + [w.numel() for w in weights if w.dtype == torch.int8]


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and the scales of quantised weights, which are neither."""
    for p in model.parameters():
        yield p
        for name in ("CB", "SCB"):
            if isinstance(getattr(p, name, None), Tensor):
                yield getattr(p, name)
    for module in model.modules():  # which have the state, too: a weight that is dealt out has lost it
        state = getattr(getattr(module, "weight", None), "quant_state", None) or getattr(module, "quant_state", None)
        for one in (state, getattr(state, "state2", None)):
            if one is not None:
                yield from (x for x in (one.absmax, one.code, one.offset) if isinstance(x, Tensor))
    yield from model.buffers()
