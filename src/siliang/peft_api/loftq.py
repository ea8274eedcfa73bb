"""LoftQ's initialization of LoRA on a base model that is quantized already (Li et al., 2023, arXiv:2310.08659).

    s B A = the best approximation of W - Q of rank R        W: the weight in the base model's files, Q: quantized

Shapes: W, Q (O, I), A (R, I), B (O, R); I in, O out, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from siliang.hub import cached_file
from siliang.language import Bilingual
from siliang.methods.lora_config import LoraConfig
from siliang.methods.low_rank import LowRankLinear
from siliang.models.folder import INDEX, MOST_INDEX_BYTES
from siliang.models.introspect import features
from siliang.models.quantized import float_weight, is_quantized
from siliang.peft_api.checks import check_known
from siliang.peft_api.functions import injection_of
from siliang.peft_api.model import PeftModel
from siliang.safety.safe_json import read_json
from siliang.types import ConfigError, ModelError
from siliang.weight_files import check_weights

WEIGHTS = "model.safetensors"


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: PeftModel,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[PeftModel, str], bool] | None = None,
) -> None:
    """Initializes LoRA on a base model in 4 or 8 bits so that it corrects the error of the quantization.

    The weights in full precision are read one at a time. Where s = 1 the factors are PEFT's; otherwise they are divided
    by it, so that the sum is right. It runs on a CPU too.

    Args:
        peft_model: A quantized base model with LoRA.
        model_path: The folder of the base model in full precision, or its model.safetensors. None: the one that the
            model is from, here or in the hub's cache.
        adapter_name: Which adapter.
        callback: Called with the model and the layer's name after each layer; where it gives False, the layer's factors
            are put back. Calling again may gain more, because later layers have changed since.

    Raises:
        ConfigError: The adapter is not plain LoRA, or is on no quantized layer.
        ModelError: The weights are not there, are damaged, or are those of another model.
    """
    check_known(adapter_name, injection_of(peft_model).peft_config)
    config = peft_model.peft_config[adapter_name]
    if not isinstance(config, LoraConfig) or config.variant not in (None, "velora_config"):
        what = config.variant if isinstance(config, LoraConfig) else config.peft_type
        raise ConfigError(
            Bilingual(
                f"LoftQ initializes plain LoRA, and adapter {adapter_name!r} has {what}.",
                f"LoftQ 只用于普通 LoRA，而适配器 {adapter_name!r} 是 {what}。",
            )
        )
    adapters = peft_model.injection.adapters[adapter_name].layers.items()
    layers = {path: a for path, a in adapters if isinstance(a, LowRankLinear) and is_quantized(a.layer.base_layer)}
    if not layers:
        raise ConfigError(
            Bilingual(
                f"Adapter {adapter_name!r} is on no quantized layer: on a base model in full precision set "
                "init_lora_weights = 'loftq'.",
                f"适配器 {adapter_name!r} 不在任何量化层上：全精度的基座模型请用 init_lora_weights = 'loftq'。",
            )
        )
    if not all(adapter.config_scaling for adapter in layers.values()):
        raise ConfigError(Bilingual("lora_alpha = 0: LoRA would add nothing.", "lora_alpha = 0：LoRA 不起作用。"))
    stored = StoredWeights.of(peft_model.get_base_model(), model_path)
    for path, adapter in layers.items():
        before = adapter.A.clone(), adapter.B.clone()
        correct(adapter, stored.weight(path, adapter.layer.base_layer))
        if callback is not None and not callback(peft_model, path):
            adapter.A.copy_(before[0])
            adapter.B.copy_(before[1])


def correct(adapter: LowRankLinear, W_OI: Tensor) -> None:
    """Makes s B A the best approximation of W - Q."""
    Q_OI = float_weight(adapter.layer.base_layer).float()
    U, S, Vh = torch.linalg.svd(W_OI.to(Q_OI) - Q_OI, full_matrices=False)
    R = min(len(adapter.A), len(S))  # a weight may have fewer directions
    s = adapter.config_scaling
    root = (S[:R] / abs(s)).sqrt()
    adapter.A.zero_()[:R] = (root[:, None] * Vh[:R]).to(adapter.A.dtype)
    adapter.B.zero_()[:, :R] = (U[:, :R] * root * math.copysign(1, s)).to(adapter.B.dtype)


@dataclass(frozen=True)
class StoredWeights:
    """The safetensors files of a base model, of which one weight at a time is read.

    Attributes:
        source: Where they are, for errors.
        files: The file of each weight, by its key.
        prefix: What the base model calls its body, which a key may have or not.
    """

    source: str
    files: dict[str, Path]
    prefix: str

    @classmethod
    def of(cls, base: Any, model_path: str | Path | None) -> StoredWeights:
        """
        Raises:
            ModelError: There are none.
        """
        given = model_path is not None
        source = str(model_path if given else getattr(getattr(base, "config", None), "_name_or_path", "") or "")
        find = _here(Path(source)) if given or Path(source).is_dir() else _in_the_cache(source)
        try:
            if source and (file := find(WEIGHTS)) is not None:
                files = dict.fromkeys(_keys(file), file)
            elif source and (index := find(WEIGHTS + INDEX)) is not None:
                files = dict(_parts(index, find))
            else:
                raise ModelError(
                    Bilingual(
                        f"{source or 'The model'} has no {WEIGHTS}, whose weights LoftQ reads one at a time: give "
                        "model_path, the folder of the base model in full precision.",
                        f"{source or '模型'} 没有 {WEIGHTS}（LoftQ 逐个读取其中的权重）：请给出 model_path，"
                        "即全精度基座模型的文件夹。",
                    )
                )
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(Bilingual(f"{source}: {WEIGHTS} is damaged.", f"{source}：{WEIGHTS} 已损坏。")) from error
        return cls(source, files, str(getattr(base, "base_model_prefix", "") or ""))

    def weight(self, path: str, layer: Any) -> Tensor:
        """The weight of a layer, (O, I), on the CPU.

        Raises:
            ModelError: The files have none of this size.
        """
        body = f"{self.prefix}."
        names = [f"{path}.weight", f"{path}.weight".removeprefix(body), f"{body}{path}.weight"]
        key = next((name for name in names if name in self.files), None)
        if key is None:
            raise self._other(path)
        with safe_open(self.files[key], framework="pt", device="cpu") as opened:
            W = opened.get_tensor(key)
        stored_in_by_out = getattr(getattr(layer, "source_cls", None), "__name__", "") == "Conv1D"
        W = W.T if stored_in_by_out else W
        if W.shape != features(layer)[::-1] or not W.is_floating_point():
            raise self._other(path)
        return W

    def _other(self, path: str) -> ModelError:
        return ModelError(
            Bilingual(
                f"{self.source} has no weight of {path} in full precision and of its size: are the files those of "
                "another model?",
                f"{self.source} 中没有 {path} 的全精度权重，或形状不同：这些文件是否属于别的模型？",
            )
        )


def _here(path: Path) -> Callable[[str], Path | None]:
    folder = path.parent if path.name == WEIGHTS else path
    return lambda name: found if (found := folder / name).is_file() else None


def _in_the_cache(name: str) -> Callable[[str], Path | None]:
    return lambda file: cached_file(name, file)


def _keys(file: Path) -> list[str]:
    check_weights(file)
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _parts(index: Path, find: Callable[[str], Path | None]) -> Iterator[tuple[str, Path]]:
    """The file of each weight that an index names."""
    checked: dict[str, Path] = {}
    for key, name in read_json(index, most_bytes=MOST_INDEX_BYTES, foreign=True)["weight_map"].items():
        if name not in checked:
            file = find(name) if Path(name).name == name else None
            if file is None:
                raise ValueError(f"{index} names {name}")
            check_weights(file)
            checked[name] = file
        yield key, checked[name]
