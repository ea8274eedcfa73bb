"""Base models of fake tensors, which have shapes and dtypes and take no memory."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from siliang.capabilities import why_missing
from siliang.config import QuantizationConfig
from siliang.data.batch import Batch
from siliang.language import Bilingual, local
from siliang.models.base_config import MISFITS
from siliang.models.invented import READ
from siliang.models.load import SHARDABLE_STORAGE, kept_whole, model_from_config
from siliang.models.quantized import empty_quantized
from siliang.models.spec import ModelSpec
from siliang.ops.stored import StoredWeight, may_stay
from siliang.types import ConfigError, ModelError, first_line


class _SharedMode(FakeTensorMode):
    """A mode that a copied fake tensor shares with its original.

    torch would copy the mode with the tensor, and with the mode the weak references to storages. Two objects would then
    hold one reference, and the second one to be collected would write into freed memory.
    """

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self

    def dispatch(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:
            # torch's shapes are for bf16 alone, its kernels for other dtypes too
            given = dict(zip(("self", "mat2", "offs", "bias", "out_dtype"), args, strict=False)) | dict(kwargs or {})
            shape = _grouped_shape(args[0], given["mat2"], given.get("offs"))
            with self:
                return torch.empty(shape, dtype=given.get("out_dtype") or args[0].dtype, device=args[0].device)
        return super().dispatch(func, types, args, kwargs or {})


def _grouped_shape(a: Tensor, b: Tensor, ends: Tensor | None) -> tuple[int, ...]:
    """The shape of a product by groups, of which `ends` says where each ends in the dimension that they share; None for
    two batches of matrices, which are groups already."""
    if a.dim() == 2 and b.dim() == 2:
        assert ends is not None
        return (ends.shape[0], a.shape[0], b.shape[1])
    return (a.shape[-2], b.shape[-1]) if 2 in (a.dim(), b.dim()) else (a.shape[0], a.shape[1], b.shape[2])


@contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Within the block torch does not log what fails on fake tensors: a trial of a model may, and says why."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def fake_mode() -> Iterator[FakeTensorMode]:
    """Within the block every new tensor is fake, and no initializer runs.

    Raises:
        ConfigError: The installed libraries lack a part that this needs.
    """
    for needed in ("models of fake tensors", "tracking of live tensors"):
        if (missing := why_missing(needed)) is not None:
            raise ConfigError(Bilingual(f"not planned: {missing}", f"无法预估：{local(missing, 'zh')}"))
    with warnings.catch_warnings():
        # torch's own deepcopy of a tensor asks for its address
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        with _SharedMode(allow_non_fake_inputs=True) as mode, no_init_weights(), _without_tracebacks():
            yield mode


def make_fake_base(
    config: PretrainedConfig,
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    quantization: QuantizationConfig | None = None,
    shardable: bool = False,
    compute_dtype: torch.dtype = torch.float32,
    attention: str | None = None,
) -> PreTrainedModel:
    """A base model of this config, in eval mode; called within `fake_mode`.

    Args:
        spec: The task's requirements for the model.
        dtype: Dtype of the weights that are not quantized.
        shardable: As for `load_model`.
        compute_dtype: Dtype in which quantized weights are multiplied.
        attention: transformers' attn_implementation; None for its own choice.

    Raises:
        ModelError: transformers has no model of this kind for the task, or the config is incomplete.
    """
    chosen = {"attn_implementation": attention} if attention else {}
    try:
        model = model_from_config(config, spec, dtype=dtype, **chosen)
    except MISFITS as error:
        why = first_line(error, kind=True)
        raise ModelError(
            Bilingual(
                f"a {config.model_type} cannot be made for {spec.task} from its config: {why}",
                f"无法按配置为 {spec.task} 建立 {config.model_type}：{local(why, 'zh')}",
            )
        ) from None
    model.tie_weights()  # transformers does this during initialization, which is off here
    _keep_wide(model, dtype)
    if quantization is not None:
        kept = [*kept_whole(spec), *(getattr(model, "_keep_in_fp32_modules", None) or [])]
        _quantize(model, quantization, kept, compute_dtype, SHARDABLE_STORAGE if shardable else torch.uint8)
    return model.eval()


def keep_stored(base: PreTrainedModel, kept: torch.dtype) -> None:
    """Keeps the large matrices in the format that they have in the model's files, as loading does; within `fake_mode`.

    Args:
        base: A model whose parameters are marked as read from files, or, if the files have all, not marked.
    """
    marked = any(hasattr(p, READ) for p in base.parameters())
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in list(base.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            if not may_stay(kept, p.dtype, p.shape) or (marked and not getattr(p, READ, False)):
                continue
            if id(p) not in made:
                stored = StoredWeight(torch.empty_like(p, dtype=kept), p.dtype)
                made[id(p)] = nn.Parameter(stored, requires_grad=p.requires_grad)
                if marked:
                    setattr(made[id(p)], READ, True)
            setattr(module, name, made[id(p)])


def to_fake(mode: FakeTensorMode, batch: Batch) -> Batch:
    """The same batch of fake tensors."""
    inputs: dict[str, Tensor] = {name: mode.from_tensor(x) for name, x in batch.inputs.items()}
    targets = None if batch.targets is None else mode.from_tensor(batch.targets)
    return replace(batch, inputs=inputs, targets=targets)


def _keep_wide(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keeps the parts in fp32 that a model names for it, as from_pretrained does in half precision."""
    names = list(getattr(model, "_keep_in_fp32_modules_strict", None) or [])
    if dtype is torch.float16:
        names += getattr(model, "_keep_in_fp32_modules", None) or []
    if dtype is torch.float32 or not names:
        return
    for path, module in model.named_modules():
        if set(path.split(".")) & set(names):
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=torch.float32)))


def _quantize(
    model: nn.Module, wanted: QuantizationConfig, kept: list[str], compute_dtype: torch.dtype, storage: torch.dtype
) -> None:
    """Replaces the linear layers by bitsandbytes' layers, in the state that they have after loading."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D):  # GPT-2's, whose weight is the other way round
            inputs, outputs = module.weight.shape
            module = nn.Linear(inputs, outputs, dtype=module.weight.dtype)
        if type(module) is not nn.Linear or not should_convert_module(path, kept):
            continue
        parent = model.get_submodule(path.rpartition(".")[0])
        new = empty_quantized(
            module,
            bits=wanted.bits,
            kind=wanted.type,
            double=wanted.double,
            compute_dtype=compute_dtype,
            storage=storage,
        )
        if wanted.bits == 8:
            state: Any = new.state
            state.threshold = 0.0  # how many inputs are beyond it, and kept in 16 bits, is not known here
        setattr(parent, path.rpartition(".")[2], new)
