"""AutoPeftModel and its like: an adapter together with the base model that its config names."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import transformers
from torch import nn

from siliang.hub import HUB_ARGUMENTS, find_file
from siliang.language import Bilingual
from siliang.methods.config import PeftConfig
from siliang.peft_api import for_tasks  # noqa: F401, the classes that for_task knows
from siliang.peft_api.model import PeftModel
from siliang.types import AdapterError, TaskType

TRUSTED = ("transformers", "torch")  # whose classes a config without a task type may name
OF_THE_ADAPTER = ("subfolder", "autocast_adapter_dtype", "low_cpu_mem_usage", "key_mapping", "torch_device")
OF_THE_ADAPTER += ("ephemeral_gpu_offload",)


class AutoPeftModel:
    """For adapters without a task type, whose config names the base model's class; the other classes take these too.

    Attributes:
        task_type: The task type of the adapters that it loads; None for those without one.
        auto_class: transformers' class that loads their base models.
    """

    task_type: ClassVar[TaskType | None] = None
    auto_class: ClassVar[str] = ""

    def __init__(self) -> None:
        name = type(self).__name__
        raise OSError(
            Bilingual(
                f"{name} has no instances: call {name}.from_pretrained(adapter folder or hub name).",
                f"{name} 没有实例：请调用 {name}.from_pretrained(适配器的文件夹或 hub 上的名称)。",
            )
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Loads an adapter and its base model, whose embeddings grow to the tokenizer in the adapter's folder.

        Args:
            pretrained_model_name_or_path: The adapter's folder, or its name on the hub.
            adapter_name: Its name in the model.
            is_trainable: Train it further.
            config: Used in the file's place.
            revision: The adapter's on the hub; the base model's is in the config.
            import_allowlist: Packages whose classes a config without a task type may name; None: transformers, torch.
            kwargs: For the adapter `subfolder`, `key_mapping` and the like; for both what the hub is asked with, such
                as `token`; anything else goes to the base model, such as `dtype` and `device_map`.

        Raises:
            AdapterError: The adapter has another task type, or names a class outside of the allowed packages.
        """
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        own = {key: kwargs.pop(key) for key in OF_THE_ADAPTER if key in kwargs}
        config = config or PeftConfig.from_pretrained(
            pretrained_model_name_or_path, own.get("subfolder"), revision=revision, **hub
        )
        base_class = cls._base_class(config, str(pretrained_model_name_or_path), import_allowlist or TRUSTED)
        if config.base_model_name_or_path is None:
            raise AdapterError(
                Bilingual(
                    f"{pretrained_model_name_or_path} does not name its base model: use PeftModel.from_pretrained.",
                    f"{pretrained_model_name_or_path} 没有写明基座模型：请用 PeftModel.from_pretrained。",
                )
            )
        base = base_class.from_pretrained(config.base_model_name_or_path, revision=config.revision, **kwargs)
        _grow(base, str(pretrained_model_name_or_path), own.get("subfolder"), revision)
        return PeftModel.for_task(cls.task_type or config.task_type).from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            revision=revision,
            **own,
            **hub,
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, source: str, allowed: Sequence[str]) -> Any:
        if config.task_type not in (cls.task_type, None):
            way = next((k.__name__ for k in AUTO_CLASSES if k.task_type == config.task_type), "AutoPeftModel")
            raise AdapterError(
                Bilingual(
                    f"{source} has task type {config.task_type}: load it with {way}.",
                    f"{source} 的任务类型是 {config.task_type}：请用 {way} 加载。",
                )
            )
        if config.task_type is not None:
            return getattr(transformers, cls.auto_class)
        mapping = config.auto_mapping or {}
        package, name = str(mapping.get("parent_library", "")), str(mapping.get("base_model_class", ""))
        if not package or not name:
            raise AdapterError(
                Bilingual(
                    f"{source} does not name the class of its base model: use PeftModel.from_pretrained.",
                    f"{source} 没有写明基座模型的类：请用 PeftModel.from_pretrained。",
                )
            )
        if not any(package == one or package.startswith(f"{one}.") for one in allowed):
            raise AdapterError(
                Bilingual(
                    f"{source} wants a class of the package {package!r}. If you trust it, allow it: "
                    f"import_allowlist=[{package!r}].",
                    f"{source} 要用 {package!r} 包中的类。如果信任它，请允许：import_allowlist=[{package!r}]。",
                )
            )
        found = getattr(importlib.import_module(package), name, None)
        if not isinstance(found, type) or not issubclass(found, nn.Module):
            raise AdapterError(
                Bilingual(
                    f"{source}: {package} has no model class {name!r}.",
                    f"{source}：{package} 中没有模型类 {name!r}。",
                )
            )
        return found


def _grow(base: Any, source: str, subfolder: str | None, revision: str | None) -> None:
    """Grows the embeddings to the tokenizer in an adapter's folder, as adapters with added tokens need.

    Args:
        source: The adapter's folder, or its name on the hub.
    """
    place = str(Path(source) / (subfolder or "")) if Path(source).is_dir() or subfolder is None else source
    name = "tokenizer_config.json" if place != source or subfolder is None else f"{subfolder}/tokenizer_config.json"
    found = find_file(place, name, revision)
    if found is None or not hasattr(base, "get_input_embeddings"):
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(found.parent)
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For adapters with task type CAUSAL_LM."""

    task_type = TaskType.CAUSAL_LM
    auto_class = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For adapters with task type SEQ_2_SEQ_LM."""

    task_type = TaskType.SEQ_2_SEQ_LM
    auto_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For adapters with task type SEQ_CLS."""

    task_type = TaskType.SEQ_CLS
    auto_class = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For adapters with task type TOKEN_CLS."""

    task_type = TaskType.TOKEN_CLS
    auto_class = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For adapters with task type QUESTION_ANS."""

    task_type = TaskType.QUESTION_ANS
    auto_class = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For adapters with task type FEATURE_EXTRACTION."""

    task_type = TaskType.FEATURE_EXTRACTION
    auto_class = "AutoModel"


AUTO_CLASSES: tuple[type[AutoPeftModel], ...] = (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForFeatureExtraction,
)
