"""What siliang reaches into of the installed libraries, beyond their documented interfaces, and whether it is there.

One row of `CAPABILITIES` is one trick. A room asks `why_missing` before it uses the trick; where a release lacks a part
of it, the trick is off and the user is told why, in place of an error from somewhere inside. The contract tests
(tests/contracts, `make compat`) ask the same of every row, and try each trick.

Importing this file imports nothing of those libraries.
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
    """One trick and what it needs.

    Attributes:
        name: What it is for.
        needs: Each as "module:Name.attribute", or "module:Name.function(argument, argument)" where it is called with
            these arguments.
        without: What a run does where a part is missing.
        optional: The library may be absent: it belongs to an extra.
    """

    name: str
    needs: tuple[str, ...]
    without: str
    optional: bool = False

    @property
    def library(self) -> str:
        """The library that it reaches into."""
        return self.needs[0].partition(":")[0].partition(".")[0]


CAPABILITIES: tuple[Capability, ...] = (
    Capability(
        "packed rows",
        (
            "transformers:AttentionInterface.register(key, value)",
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
        "prefix tuning of BLOOM",
        ("transformers.models.bloom.modeling_bloom:build_alibi_tensor(attention_mask, num_heads, dtype)",),
        "prefix tuning of BLOOM is refused",
    ),
    Capability(
        "weights loaded piece by piece",
        (
            "transformers.core_model_loading:_materialize_copy(tensor, device, dtype)",
            "transformers.core_model_loading:GLOBAL_WORKERS",
        ),
        "loading holds the weights' files in memory beside the weights",
    ),
    Capability(
        "attention and kernels chosen by siliang alone",
        (
            "transformers:PreTrainedConfig._attn_implementation",
            "transformers:PreTrainedConfig._experts_implementation",
        ),
        "models are not loaded: their files could name code of the hub",
    ),
    Capability(
        "adapters beside a model left aside",
        ("transformers:PreTrainedModel._hf_peft_config_loaded",),
        "models are not loaded: an adapter in their folder could be taken unseen",
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
        "models without memory",
        (
            "torch._subclasses.fake_tensor:FakeTensorMode(allow_non_fake_inputs)",
            "transformers.initialization:no_init_weights",
            "transformers.quantizers.quantizers_utils:should_convert_module(full_name, patterns)",
        ),
        "runs are not planned",
    ),
    Capability(
        "counting of live tensors",
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
        "ranks that do not exist",
        ("torch.testing._internal.distributed.fake_pg:FakeStore",),
        "runs on several devices are not planned",
    ),
    Capability(
        "DDP of what is trained alone",
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
        "DeepSpeed's ZeRO",  # distributed/deepspeed.py lists what of its objects is used beside these
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
    """Whether one trick works here.

    Attributes:
        missing: The first part that is not there, in words; None where all are.
        installed: The library is.
    """

    capability: Capability
    missing: str | None
    installed: bool = True


def report() -> Iterator[Finding]:
    """Each trick beside the installed libraries."""
    for capability in CAPABILITIES:
        yield Finding(capability, why_missing(capability.name), _version(capability.library) is not None)


@cache
def why_missing(name: str) -> str | None:
    """Why a trick cannot be used with the installed libraries, in words; None where it can.

    Args:
        name: Of a capability.
    """
    capability = next(one for one in CAPABILITIES if one.name == name)
    return next((why for need in capability.needs if (why := _lacks(need)) is not None), None)


def _lacks(need: str) -> str | None:
    module, _, path = need.partition(":")
    path, _, arguments = path.rstrip(")").partition("(")
    library = module.partition(".")[0]
    if (found := _version(library)) is None:
        return Bilingual(f"{library} is not installed", f"没有安装 {library}")
    try:
        target: Any = import_module(module)
        for part in path.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError):
        part = f"{module.removeprefix(library + '.')}.{path}"
        return Bilingual(f"{library} {found} has no {part}", f"{library} {found} 没有 {part}")
    wanted = [name.strip() for name in arguments.split(",") if name.strip()]
    if not wanted:
        return None
    try:
        taken = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return Bilingual(
            f"{library} {found}: what {path} takes cannot be found out", f"{library} {found}：无法得知 {path} 的参数"
        )
    lost = [name for name in wanted if name not in taken]
    if not lost:
        return None
    return Bilingual(
        f"{library} {found}: {path} takes no {', '.join(lost)}", f"{library} {found}：{path} 没有参数 {'、'.join(lost)}"
    )


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
