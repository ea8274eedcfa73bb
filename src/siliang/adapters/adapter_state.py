"""What an adapter consists of, as its file holds it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor, nn
from torch.func import functional_call
from transformers import PretrainedConfig, PreTrainedModel

from siliang.adapters.adapter import AttachedAdapter
from siliang.adapters.injection import Injection
from siliang.adapters.table_rows import RowsAdapter
from siliang.hub import cached_file
from siliang.language import Bilingual
from siliang.methods import method_of
from siliang.methods.config import PeftConfig
from siliang.methods.prompt import PROMPT_KEY, Prompt
from siliang.models.introspect import output_layer, word_embeddings
from siliang.module_paths import inside
from siliang.safety.safe_json import read_json
from siliang.types import AdapterError, ConfigError

CONFIG = "config.json"


def adapter_state(
    injection: Injection,
    name: str,
    *,
    state_dict: dict[str, Tensor] | None = None,
    keys: Mapping[int, str] | None = None,
    embeddings: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The tensors of adapter `name` under the keys of its file. They are live where they can be.

    Args:
        state_dict: The whole model's, to take the values from, such as one that was gathered from several devices.
        keys: The keys in `state_dict` by the ids of the live tensors.
        embeddings: The embeddings and the head too. "auto": where the adapter has others than the base, or they have
            another size than the base model's config says and the adapter has not every new row.

    Raises:
        AdapterError: `state_dict` lacks a part of it.
        ConfigError: `embeddings` is none of True, False and "auto".
    """
    adapter = injection.adapters[name]
    tensors = adapter.tensors()
    if state_dict is not None:
        keys = dict(keys or {})
        if adapter.prompt is not None:
            keys |= {id(t): key for key, t in tensors.items() if key == PROMPT_KEY}
            state_dict = {**state_dict, PROMPT_KEY: _prompt_of(adapter.prompt, name, state_dict)}
        if missing := [key for key, t in tensors.items() if keys.get(id(t), key) not in state_dict]:
            raise AdapterError(
                Bilingual(
                    f"state_dict lacks {len(missing)} tensors of adapter {name!r}, such as {missing[0]}.",
                    f"state_dict 缺少适配器 {name!r} 的 {len(missing)} 个张量，例如 {missing[0]}。",
                )
            )
        tensors = {key: state_dict[keys.get(id(t), key)] for key, t in tensors.items()}
    tensors = method_of(adapter.config).to_file(adapter.config, tensors)
    return _with_embeddings(injection, adapter, tensors, wanted=embeddings)


def _prompt_of(prompt: Prompt, name: str, state_dict: dict[str, Tensor]) -> Tensor:
    """The table of virtual tokens with the values of a whole model's state."""
    start = f"prompt_encoder.{name}."
    own = {key.removeprefix(start): t for key, t in state_dict.items() if key.startswith(start)}
    if missing := sorted(prompt.state_dict().keys() - own.keys()):
        raise AdapterError(
            Bilingual(f"state_dict lacks {start}{missing[0]}.", f"state_dict 缺少 {start}{missing[0]}。")
        )
    return functional_call(prompt, own, ())


def _with_embeddings(
    injection: Injection, adapter: AttachedAdapter, tensors: dict[str, Tensor], *, wanted: bool | str
) -> dict[str, Tensor]:
    """The tensors of an adapter, with the embeddings and the head or without them.

    Args:
        wanted: "auto": where the adapter has others than the base (they are among the tensors), or they have another
            size than the base model's config says.

    Raises:
        ConfigError: `wanted` is none of True, False and "auto".
    """
    if wanted not in (True, False, "auto"):
        raise ConfigError(
            Bilingual(
                f"save_embedding_layers = {wanted!r}: must be True, False or 'auto'.",
                f"save_embedding_layers = {wanted!r}：只能是 True、False 或 'auto'。",
            )
        )
    with injection.bare() as base:
        if wanted is True and not isinstance(base, PreTrainedModel):
            warnings.warn(
                Bilingual(
                    "save_embedding_layers: the model is none of transformers, and its embeddings may not be found.",
                    "save_embedding_layers：该模型不是 transformers 的模型，可能找不到它的嵌入层。",
                ),
                stacklevel=5,
            )
        ends = [path for path in embedding_parameters(base) if not inside(path, list(adapter.parts.modules))]
        keys = {adapter.parameter_key(path): base.get_parameter(path) for path in ends}
        now = _vocabulary(base)
    if wanted is False:
        return {key: t for key, t in tensors.items() if key not in keys}
    if wanted == "auto":
        before = _vocabulary_of(adapter.config)
        if before in (None, now):
            return tensors
        if before is not None and now is not None and before < now:  # what has grown may be among the adapter's rows
            grown = range(before, now)
            keys = {key: t for key, t in keys.items() if not _has_rows(adapter, key, grown)}
    return {adapter.written_key(key): t for key, t in keys.items()} | tensors


def _has_rows(adapter: AttachedAdapter, key: str, rows: range) -> bool:
    """Whether the adapter has these rows of the table whose weight is called `key` in the file."""
    layers = (one for path, one in adapter.layers.items() if adapter.parameter_key(f"{path}.weight") == key)
    return any(isinstance(one, RowsAdapter) and set(rows) <= set(one.rows.indices) for one in layers)


def _vocabulary(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    text = config.get_text_config() if isinstance(config, PretrainedConfig) else config
    return getattr(text, "vocab_size", None)


def _vocabulary_of(config: PeftConfig) -> int | None:
    """The vocabulary's size that the base model's config says; None where it is neither here nor in the hub's cache."""
    name = config.base_model_name_or_path
    if not name:
        return None
    path = Path(name) / CONFIG if Path(name).is_dir() else cached_file(name, CONFIG, revision=config.revision)
    if path is None or not path.is_file():
        return None
    try:
        values = read_json(path, foreign=True)
    except (OSError, ValueError):
        return None
    text = values.get("text_config") if isinstance(values, dict) else None
    for holder in (values, text):
        if isinstance(holder, dict) and isinstance(holder.get("vocab_size"), int):
            return holder["vocab_size"]
    return None


def embedding_parameters(base: nn.Module) -> list[str]:
    """The paths of the weights of the base model's embeddings and head, which PEFT saves too when they are tuned or
    were resized.
    """
    modules = {id(module) for module in (word_embeddings(base), output_layer(base)) if module is not None}
    weights = {
        id(weight): f"{path}.weight"
        for path, module in reversed(list(base.named_modules()))
        if path
        and id(module) in modules
        and (weight := dict(module.named_parameters(recurse=False)).get("weight")) is not None
    }
    return list(weights.values())  # of tied ones the first
