"""The undocumented parts of other libraries that siliang uses, and whether the installed versions have them.

A row of `CAPABILITIES` is one use. The code calls `why_missing` before it; if a release lacks a part, the feature is
off, and the user sees the reason instead of an internal error. The contract tests (tests/contracts, `make compat`)
check every row, and try each use.

Importing this file imports none of those libraries.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from siliang.language import Bilingual


@dataclass(frozen=True)
class Capability:
    """A feature and the parts of libraries that it needs.

    Attributes:
        name: The feature.
        needs: Parts as "module:Name.attribute", or "module:Name.function(argument, argument)" if it is called with
            these arguments.
        without: The consequence if a part is missing.
        optional: The library belongs to an extra, and may be missing.
    """

    name: str
    needs: tuple[str, ...]
    without: str
    optional: bool = False

    @property
    def library(self) -> str:
        """The library of the parts."""
        return self.needs[0].partition(":")[0].partition(".")[0]


CAPABILITIES: tuple[Capability, ...] = (
    Capability(
        "packed rows",
        (
            "transformers:AttentionInterface.register(key, value)",
            "transformers:AttentionMaskInterface.register(key, value)",
            "transformers:PreTrainedConfig._attn_implementation",
            "transformers.modeling_layers:GradientCheckpointingLayer",
        ),
        "batches are padded",
    ),
    Capability(
        "packed rows of BLOOM",
        (
            "transformers.models.bloom.modeling_bloom:BloomAttention.forward"
            "(hidden_states, residual, alibi, attention_mask, layer_past)",
            "transformers.models.bloom.modeling_bloom:BloomAttention._reshape(fused_qkv)",
        ),
        "BLOOM's batches are padded",
    ),
    Capability(
        "shared beginnings of prompts",
        (
            "transformers:GenerationMixin.prepare_inputs_for_generation"
            "(input_ids, next_sequence_length, is_first_iteration)",
            "transformers:DynamicCache(config)",
            "transformers.cache_utils:DynamicLayer.lazy_initialization(key_states, value_states)",
            "transformers.cache_utils:DynamicLayer.get_mask_sizes(query_length)",
            "transformers.cache_utils:DynamicSlidingWindowLayer",
            "transformers:AttentionInterface.register(key, value)",
            "transformers:AttentionMaskInterface.register(key, value)",
            "transformers:PreTrainedConfig._attn_implementation",
        ),
        "the beginning of prompts is computed for each row",
    ),
    Capability(
        "prefix tuning of BLOOM",
        ("transformers.models.bloom.modeling_bloom:build_alibi_tensor(attention_mask, num_heads, dtype)",),
        "prefix tuning of BLOOM is refused",
    ),
    Capability(
        "weights loaded in pieces",
        (
            "transformers.core_model_loading:_materialize_copy(tensor, device, dtype)",
            "transformers.core_model_loading:GLOBAL_WORKERS",
        ),
        "loading holds the weights' files in memory besides the weights",
    ),
    Capability(
        "attention and kernels chosen only by siliang",
        (
            "transformers:PreTrainedConfig._attn_implementation",
            "transformers:PreTrainedConfig._experts_implementation",
        ),
        "models are not loaded: their files could name code of the hub",
    ),
    Capability(
        "adapters next to a model ignored",
        ("transformers:PreTrainedModel._hf_peft_config_loaded",),
        "models are not loaded: an adapter in their folder could be loaded unnoticed",
    ),
    Capability(
        "adapters in checkpoints of transformers.Trainer",
        (
            "transformers.trainer_utils:_is_peft_model(model)",
            "transformers.trainer:_is_peft_model(model)",
        ),
        "a stock Trainer neither resumes nor loads the best checkpoint",
    ),
    Capability(
        "siliang's models and configs in TRL's SFTTrainer",
        (
            "trl.trainer.sft_trainer:is_peft_model(model)",
            "trl.trainer.sft_trainer:get_peft_model(model, peft_config)",
            "trl.trainer.sft_trainer:PeftConfig",
            "trl.trainer.sft_trainer:BaseTunerLayer",
        ),
        "SFTTrainer takes neither",
        optional=True,
    ),
    Capability(
        "adapters of transformers 4",
        ("transformers.core_model_loading:revert_weight_conversion(model, state_dict)",),
        "its names of the experts in a mixture are not known: adapters with them are refused",
    ),
    Capability(
        "kept index of transformers' models",
        ("transformers.utils.import_utils:create_import_structure_from_path(module_path)",),
        "each command reads all of transformers' model files",
    ),
    Capability(
        "models of fake tensors",
        (
            "torch._subclasses.fake_tensor:FakeTensorMode(allow_non_fake_inputs)",
            "transformers.initialization:no_init_weights",
            "transformers.quantizers.quantizers_utils:should_convert_module(full_name, patterns)",
        ),
        "runs are not planned",
    ),
    Capability(
        "tracking of live tensors",
        (
            "torch:UntypedStorage.resize_",
            "torch:UntypedStorage._cdata",
            "torch.utils._python_dispatch:TorchDispatchMode",
            "torch.utils._pytree:tree_leaves",
            "torch.utils.flop_counter:flop_registry",
            "torch.distributed.tensor:DTensor._local_tensor",
            "torch:ops.aten._safe_softmax",
        ),
        "runs are not planned",
    ),
    Capability(
        "fake process groups",
        ("torch.testing._internal.distributed.fake_pg:FakeStore",),
        "runs on several devices are not planned",
    ),
    Capability(
        "DDP of trained parameters only",
        (
            "torch.nn.parallel:DistributedDataParallel._set_params_and_buffers_to_ignore_for_model"
            "(module, params_and_buffers_to_ignore)",
        ),
        "DDP sends frozen weights once, and buffers in every step",
    ),
    Capability(
        "flash attention of packed rows on CUDA",
        ("torch.nn.attention.varlen:varlen_attn(window_size, enable_gqa)",),
        "attention on CUDA computes each sequence by itself",
    ),
    Capability(
        "shared beginnings",
        (
            "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu.default",
            "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
        ),
        "on a CPU, beginnings that rows share are computed for each row",
    ),
    Capability(
        "DeepSpeed's ZeRO",  # distributed/deepspeed.py lists the parts of its objects that are used besides these
        (
            "deepspeed.zero:GatheredParameters(params, modifier_rank)",
            "deepspeed.utils:set_z3_leaf_module(model, flag)",
            "deepspeed.utils:safe_get_full_optimizer_state(param, optim_state_key)",
            "deepspeed.utils:safe_set_full_optimizer_state(param, value, optim_state_key)",
            "deepspeed.utils:safe_get_full_fp32_param(param)",
            "deepspeed.utils:safe_set_full_fp32_param(param, value)",
            "accelerate.state:GradientState._set_sync_gradients(sync_gradients)",
        ),
        "distributed.strategy = deepspeed fails",
        optional=True,
    ),
    Capability(
        "quantized bases",
        (
            "bitsandbytes.functional:dequantize_4bit",
            "bitsandbytes.functional:int8_vectorwise_dequant",
            "bitsandbytes.functional:QuantState(absmax, shape, code, blocksize, quant_type, dtype, offset, state2)",
            "bitsandbytes:MatmulLtState",
            "bitsandbytes.nn:Linear4bit",
            "bitsandbytes.nn:Linear8bitLt",
        ),
        "base models are not quantized",
        optional=True,
    ),
)


@dataclass(frozen=True)
class Finding:
    """Whether a feature works with the installed libraries.

    Attributes:
        missing: The first missing part, in words; None if there is none.
        installed: The library is installed.
    """

    capability: Capability
    missing: str | None
    installed: bool = True


def report() -> Iterator[Finding]:
    """Each feature with the installed libraries."""
    for capability in CAPABILITIES:
        yield Finding(capability, why_missing(capability.name), _version(capability.library) is not None)


@cache
def why_missing(name: str) -> str | None:
    """Why a feature does not work with the installed libraries; None if it works.

    Args:
        name: The capability's name.
    """
    capability = next(one for one in CAPABILITIES if one.name == name)
    return next((why for need in capability.needs if (why := _lacks(need)) is not None), None)


def _lacks(need: str) -> str | None:
    module, _, path = need.partition(":")
    path, _, arguments = path.rstrip(")").partition("(")
    library = module.partition(".")[0]
    if (installed := _version(library)) is None:
        return Bilingual(f"{library} is not installed", f"没有安装 {library}")
    try:
        target: Any = import_module(module)
        for part in path.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError):
        part = f"{module.removeprefix(library + '.')}.{path}"
        return Bilingual(f"{library} {installed} has no {part}", f"{library} {installed} 没有 {part}")
    wanted = [name.strip() for name in arguments.split(",") if name.strip()]
    if not wanted:
        return None
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return Bilingual(
            f"{library} {installed}: the parameters of {path} are unknown",
            f"{library} {installed}：无法得知 {path} 的参数",
        )
    missing = [name for name in wanted if name not in parameters]
    if not missing:
        return None
    return Bilingual(
        f"{library} {installed}: {path} has no parameter {', '.join(missing)}",
        f"{library} {installed}：{path} 没有参数 {'、'.join(missing)}",
    )


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
