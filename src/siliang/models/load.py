"""Loads base models from safetensors. Custom code runs only if the user allowed it; errors state what to do."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import torch
import transformers
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import logging as hf_logging

from siliang.config import QuantizationConfig
from siliang.environment import bound_kernel_caches
from siliang.hardware import choose_precision
from siliang.hub import only_cached
from siliang.language import Bilingual
from siliang.models.base_config import load_config, why_not
from siliang.models.folder import NO_ADAPTER
from siliang.models.invented import embedding_weights, invented_modules, may_be_invented
from siliang.models.own_code import code_of
from siliang.models.quantized import check_quantized, keep_as_stored
from siliang.models.sizes import may_be_too_large
from siliang.models.spec import ModelSpec
from siliang.models.weights import piece_by_piece
from siliang.types import ADAPTER_CONFIG, OTHER_HEADS, ModelError

BEFORE_HEADS = ("pooler", "pre_classifier", "sequence_summary")  # modules that files may lack: they are trained then
OUTPUT_LAYERS = ("lm_head", "embed_out", "output_layer")  # never quantized: every token's probability depends on them
SHARDABLE_STORAGE = torch.bfloat16  # FSDP shards floating-point tensors: the bytes are viewed as one, bit for bit


def load_model(
    name: str,
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    labels: list[str] | None = None,
    revision: str | None = None,
    seed: int = 0,
    quantization: QuantizationConfig | None = None,
    shardable: bool = False,
    device: torch.device | None = None,
    kept: torch.dtype | None = None,
) -> PreTrainedModel:
    """A base model in eval mode, with its weights on the CPU, or, quantized, on `device`.

    Args:
        spec: The requirements of the task.
        dtype: The dtype of the weights that are not quantized.
        quantization: The quantization of the linear layers; the task's head and the output layer are not quantized.
        shardable: Store 4-bit weights in tensors of `SHARDABLE_STORAGE`.
        kept: The format of the file's matrices, if they stay in it (`StoredWeight`); None if all are converted.
        labels: The classes or tags. The head is new unless the weights have one of this size.
        seed: The seed of weights that the folder does not have, such as a new head, or the pooler of a BERT that was
            trained without one. A method trains and saves them.

    Raises:
        ModelError: The model cannot be loaded, weights of its layers are missing, or they are not quantized as its
            config states.
    """
    bound_kernel_caches()
    config = load_config(name, revision=revision)
    if (Path(name) / ADAPTER_CONFIG).is_file():
        warnings.warn(
            Bilingual(
                f"{name} has an adapter in the model's folder ({ADAPTER_CONFIG}), which is ignored: "
                "to train it further, move it into a separate folder and set `adapter` to that folder.",
                f"{name} 中除模型外还有一个适配器（{ADAPTER_CONFIG}），不会使用它：要在它上面继续训练，"
                "请把它移到单独的文件夹，并用 `adapter` 指明。",
            ),
            stacklevel=2,
        )
    if labels is not None:
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    elif spec.outputs is not None:
        config.num_labels = spec.outputs
    if spec.problem_type is not None:
        config.problem_type = spec.problem_type
    if (folder := Path(name)).is_dir() and may_be_too_large(config, folder):
        invented_weights(name, spec, config, revision=revision)  # raises if a shape differs, before memory is allocated
    with torch.random.fork_rng(), piece_by_piece(quantizing=quantization is not None, keeping=kept is not None):
        torch.manual_seed(seed)
        quantized = _quantized(quantization, spec, device or torch.device("cpu"), shardable)
        model = _from_pretrained(name, spec, config, dtype=dtype, revision=revision, **quantized)
    check_quantized(model, name)
    keep_as_stored(model)
    return model.eval()


def invented_weights(name: str, spec: ModelSpec, config: PreTrainedConfig, *, revision: str | None = None) -> list[str]:
    """The modules that `load_model` will initialize, found without reading weights.

    Args:
        config: The config of `load_config`, with the task's labels.

    Raises:
        ModelError: The model cannot be loaded.
    """
    verbosity, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()  # loading reports the missing weights
    hf_logging.disable_progress_bar()
    try:
        model = _from_pretrained(name, spec, config, dtype=torch.float32, revision=revision, device_map={"": "meta"})
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()
    return invented_modules(model)


def find_invented(name: str, spec: ModelSpec, labels: list[str] | None, *, revision: str | None = None) -> list[str]:
    """The modules that `load_model` will initialize; empty if the model has no files."""
    try:
        config = load_config(name, revision=revision)
        if (outputs := spec.columns(labels)) is not None:
            config.num_labels = outputs
        return invented_weights(name, spec, config, revision=revision)
    except ModelError:  # loading will raise it
        return []


def model_from_config(config: PreTrainedConfig, spec: ModelSpec, **settings: object) -> PreTrainedModel:
    """A model with random weights, from a config of `load_config`.

    Raises:
        ValueError: transformers has no class of this architecture for the task.
    """
    auto = _auto_class(spec)
    if (code := code_of(config)) is not None:
        return code.find_class(auto.__name__)._from_config(config, **settings)
    return auto.from_config(config, trust_remote_code=False, **settings, **_without_pooler(auto, spec, config))


def kept_whole(spec: ModelSpec) -> list[str]:
    """The modules that are never quantized, as bitsandbytes expects them."""
    return [*spec.heads, *OTHER_HEADS, *BEFORE_HEADS, *OUTPUT_LAYERS]


def _auto_class(spec: ModelSpec) -> type[_BaseAutoModelClass]:
    """The class of transformers that loads a model for the task."""
    return getattr(transformers, spec.auto_class)


def _without_pooler(auto: type[_BaseAutoModelClass], spec: ModelSpec, config: PreTrainedConfig) -> dict[str, object]:
    """The argument that leaves out the pooler, for a class that takes it."""
    mapping = auto._model_mapping
    kind = None if spec.pooler or mapping is None else mapping.get(type(config), None)
    classes = kind if isinstance(kind, list | tuple) else [kind]
    takes = all(c is not None and "add_pooling_layer" in signature(c.__init__).parameters for c in classes)
    return {"add_pooling_layer": False} if takes else {}


def _from_pretrained(
    name: str, spec: ModelSpec, config: PreTrainedConfig, *, revision: str | None, **settings: object
) -> PreTrainedModel:
    auto = _auto_class(spec)
    # transformers would load an adapter in the folder of the weights: give it a folder without one
    cached = only_cached(name)
    elsewhere = {"subfolder": NO_ADAPTER, "local_files_only": cached}
    try:
        if (code := code_of(config)) is not None:
            auto = code.find_class(auto.__name__)
            settings |= {"use_safetensors": True}
            revision = revision if Path(name).is_dir() else code.folder.name
        else:
            settings |= _without_pooler(auto, spec, config)
        model, info = auto.from_pretrained(
            name,
            config=config,
            revision=revision,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=cached,
            adapter_kwargs=elsewhere,
            **settings,
        )
    except ModelError:
        raise
    except Exception as error:  # safetensors, transformers and the Hub client have many exception classes
        raise ModelError(why_not(name, error)) from error
    if model._hf_peft_config_loaded:
        raise ModelError(
            Bilingual(
                f"{name} has an adapter in {NO_ADAPTER}, which is never used: remove it.",
                f"{name} 的 {NO_ADAPTER} 中有一个适配器，它不会被使用：请删除。",
            )
        )
    lost = {str(key[0] if isinstance(key, tuple) else key) for key in (*info["mismatched_keys"], *info["missing_keys"])}
    ends = embedding_weights(model) if lost else set()
    if lost := {key for key in lost if not may_be_invented(model, key, ends)}:
        raise ModelError(
            Bilingual(
                f"{name}: {len(lost)} weights are missing or of another shape, the first is {min(lost)}.",
                f"{name}：有 {len(lost)} 个权重缺失或形状不同，第一个是 {min(lost)}。",
            )
        )
    return model


def _quantized(
    wanted: QuantizationConfig | None, spec: ModelSpec, device: torch.device, shardable: bool
) -> dict[str, object]:
    """The arguments of from_pretrained for quantized weights."""
    if wanted is None:
        return {}
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            Bilingual(
                "quantization needs bitsandbytes, which is not installed: pip install 'siliang[cuda]'.",
                "量化需要 bitsandbytes，而它没有安装：pip install 'siliang[cuda]'。",
            )
        )
    kept = kept_whole(spec)
    if wanted.bits == 4:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=wanted.type,
            bnb_4bit_use_double_quant=wanted.double,
            bnb_4bit_compute_dtype=choose_precision(wanted.compute_dtype, device).dtype,
            bnb_4bit_quant_storage=SHARDABLE_STORAGE if shardable else torch.uint8,
            llm_int8_skip_modules=kept,
        )
    else:
        settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return {"quantization_config": settings, "device_map": {"": device}}
