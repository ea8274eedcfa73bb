"""An adapter of any method that changes linear weights, as LoRA: for programs that read nothing else.

    s B A ~ W' - W        the main directions of what merging would add to W, by its singular values

Shapes: W (O, I), A (R, I), B (O, R).
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from siliang.files import replacing
from siliang.language import Bilingual
from siliang.methods.lora_config import LoraConfig
from siliang.models.introspect import out_by_in
from siliang.peft_api.checks import check_known
from siliang.peft_api.functions import injection_of
from siliang.peft_api.of_layers import convertible_layers
from siliang.types import ConfigError
from siliang.weight_files import WEIGHTS_NAME


@dataclass(frozen=True)
class Conversion:
    """An adapter as LoRA.

    Attributes:
        config: Its config.
        tensors: Its tensors by the keys of a file.
        errors: What is lost on each layer: |s B A - (W' - W)| / |W' - W|, by path.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    errors: dict[str, float]

    @property
    def error(self) -> float:
        """What is lost on the layer that loses the most."""
        return max(self.errors.values())


def to_lora(model: nn.Module, rank: float, adapter_name: str = "default", *, progress: bool = False) -> Conversion:
    """An adapter as LoRA.

    Args:
        rank: A whole number: of every layer. From 0 to 1: the smallest of each layer whose B A has this share of the
            squared update.
        progress: Show how far it is.

    Raises:
        ConfigError: The adapter is not there, or has fewer directions than `rank`.
        KindError: The model has no adapter, or it changes more than linear weights.
    """
    injection = injection_of(model)
    check_known(adapter_name, injection.adapters)
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    if (whole and rank < 1) or (not whole and not 0 < rank <= 1):
        raise ConfigError(
            Bilingual(
                f"rank = {rank!r}: must be a whole number of at least 1, or a share from 0 to 1.",
                f"rank = {rank!r}：须为不小于 1 的整数，或 0 到 1 之间的比例。",
            )
        )
    config = injection.adapters[adapter_name].config
    if isinstance(config, LoraConfig) and config.variant is None:
        warnings.warn(
            Bilingual(f"Adapter {adapter_name!r} is LoRA already.", f"适配器 {adapter_name!r} 已经是 LoRA。"),
            stacklevel=2,
        )
    layers = convertible_layers(injection, adapter_name)
    prefix, tensors, errors, ranks = "base_model.model.", dict[str, Tensor](), dict[str, float](), dict[str, int]()
    for path, layer in tqdm(layers.items(), disable=not progress, desc="Converting to LoRA"):
        delta = layer.get_delta_weight(adapter_name)
        if (replacing_W := layer.adapters[adapter_name].overrides().get("weight")) is not None:
            delta = delta + (replacing_W - layer.base_parameter("weight"))
        delta_OI = out_by_in(layer.base_layer, delta).float()
        dtype = next(iter(layer.adapters[adapter_name].parameters().values())).dtype
        A, B = (factor.to(dtype) for factor in _directions(delta_OI, rank, path))
        ranks[path] = len(A)
        size = delta_OI.norm().item()
        errors[path] = (B.float() @ A.float() - delta_OI).norm().item() / size if size else 0.0
        tensors[f"{prefix}{path}.lora_A.weight"], tensors[f"{prefix}{path}.lora_B.weight"] = A, B
    for path in injection.adapters[adapter_name].parts.modules:
        copied = injection.attachments.module_copy(path, adapter_name)
        tensors |= {f"{prefix}{path}.{key}": t for key, t in copied.state_dict().items()}
    most = int(rank) if whole else 1  # as in PEFT, where each layer has a rank of its own
    own = {} if whole else {f"^{re.escape(path)}": r for path, r in ranks.items()}
    lora = LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        r=most,
        lora_alpha=most,
        rank_pattern=own,
        alpha_pattern={key: float(r) for key, r in own.items()},
        target_modules=sorted(layers),
        modules_to_save=config.modules_to_save,
        layer_replication=getattr(config, "layer_replication", None),
    )
    return Conversion(lora, {key: t.detach().cpu().contiguous() for key, t in tensors.items()}, errors)


def convert_to_lora(
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, object] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """`to_lora` with what PEFT's function returns. `compile_kwargs` has no effect."""
    found = to_lora(model, rank, adapter_name, progress=progressbar)
    return found.config, found.tensors


def save_as_lora(
    path: str | Path,
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, object] | None = None,
) -> Conversion:
    """Writes an adapter as LoRA into a folder, and returns what was written, with its errors.

    Raises:
        ConfigError: See `to_lora`. Nothing has been written then.
    """
    found = to_lora(model, rank, adapter_name, progress=progressbar)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS_NAME) as temporary:
        save_file(found.tensors, temporary, metadata={"format": "pt"})
    found.config.save_pretrained(folder)
    return found


@torch.no_grad()
def _directions(delta_OI: Tensor, rank: float, path: str) -> tuple[Tensor, Tensor]:
    """(A, B) of one layer."""
    U, S, Vh = torch.linalg.svd(delta_OI, full_matrices=False)
    if isinstance(rank, int):
        r = rank
    else:
        share = S.square().cumsum(0) / S.square().sum().clamp(min=torch.finfo(S.dtype).tiny)
        r = min(len(S), int((share < rank - 1e-6).sum()) + 1)
    if r > len(S):
        raise ConfigError(
            Bilingual(
                f"rank = {r}: {path} has {len(S)} rows or columns at least; choose no more.",
                f"rank = {r}：{path} 只有 {len(S)} 行或列；请不要超过它。",
            )
        )
    root = S[:r].sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root
