"""Adapters in folders: reading one to attach it, and writing those of a model."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from siliang.adapters.adapter import AttachedAdapter
from siliang.adapters.file_sizes import FileSizes
from siliang.adapters.files import load_tensors, read_training, save_adapter
from siliang.adapters.injection import Injection
from siliang.adapters.training_state import TrainingState
from siliang.hub import HUB_ARGUMENTS, adapter_folder
from siliang.language import Bilingual, together
from siliang.methods import method_of
from siliang.methods.config import CONFIG_NAME, PeftConfig
from siliang.methods.learned_initialization import initial_tensors
from siliang.methods.lora_config import LoraConfig
from siliang.methods.lora_conversion import as_plain_lora
from siliang.methods.lora_experts import by_present_names
from siliang.methods.method import Adapter
from siliang.types import ConfigError, nearest
from siliang.weight_files import read_adapter

# arguments of PEFT without effect: an adapter is where its layers are
PLACING = ("device_map", "max_memory", "offload_folder", "offload_dir", "offload_index")


class LoadResult(NamedTuple):
    """What PEFT returns where it loads: the keys that were missing, and those that have no place. Here both are empty,
    because either is an error.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter that was read from its folder.

    Attributes:
        folder: The folder.
        config: Its config.
        tensors: What it consists of, on the CPU.
        training: What only training needs; None where it was not read.
    """

    folder: Path
    config: PeftConfig
    tensors: dict[str, Tensor]
    training: TrainingState | None

    @classmethod
    def read(
        cls,
        model_id: str | Path,
        *,
        is_trainable: bool,
        with_training: bool,
        config: PeftConfig | None = None,
        key_mapping: Mapping[str, str] | None = None,
        **hub: Any,
    ) -> SavedAdapter:
        """Reads an adapter.

        Args:
            model_id: Its folder, or its name on the hub.
            is_trainable: It will be trained.
            with_training: Read what only training needs too.
            config: Used instead of the file's.
            key_mapping: Regular expressions by which keys of the file, without their beginning `base_model.model.`, are
                rewritten, and what comes in their place. The first that matches counts.
            hub: `subfolder`, and what the hub is asked with.

        Raises:
            AdapterError: The files are damaged or incomplete.
        """
        folder = adapter_folder(model_id, **hub)
        config = copy.deepcopy(config) or PeftConfig.from_pretrained(folder)
        config.inference_mode = not is_trainable
        tensors = _rewritten(read_adapter(folder), key_mapping or {})
        with_training = with_training or method_of(config).needs_state(config)
        return cls(folder, config, tensors, read_training(folder) if with_training else None)

    def on(self, injection: Injection) -> SavedAdapter:
        """The same adapter by the names that its layers have in a base model.

        Raises:
            AdapterError: It has those of transformers 4, and cannot be on this model.
        """
        if not isinstance(self.config, LoraConfig):
            return self
        with injection.bare() as base:
            config, tensors = by_present_names(base, self.config, self.tensors, source=str(self.folder))
        return replace(self, config=config, tensors=tensors)

    @property
    def sizes(self) -> FileSizes:
        """How much the files hold."""
        return FileSizes.of(self.folder, self.tensors, self.training)

    def check_same(self, own: PeftConfig, name: str) -> None:
        """
        Args:
            own: The config of adapter `name` of the model.

        Raises:
            ConfigError: The weights would not compute the same in that adapter.
        """
        own.check_same(self.config, source=f"{self.folder}/{CONFIG_NAME}", name=name)

    def load_into(self, injection: Injection, name: str) -> None:
        """Copies the weights into an attached adapter.

        Raises:
            AdapterError: They do not fit; nothing has been copied then.
        """
        load_tensors(injection, name, self.tensors, source=str(self.folder), training=self.training)


def renames_of(model: nn.Module) -> Mapping[str, str]:
    """The regular expressions by which transformers renames weights in older files of a model, as PEFT applies them."""
    return getattr(model, "_checkpoint_conversion_mapping", None) or {}


def _rewritten(tensors: dict[str, Tensor], mapping: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors under keys that `mapping` has rewritten."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        start = next((s for s in ("base_model.model.", "base_model.") if key.startswith(s)), "")
        path = key.removeprefix(start)
        pattern = next((p for p in mapping if re.search(p, path)), None)
        found[start + (path if pattern is None else re.sub(pattern, mapping[pattern], path))] = tensor
    return found


@dataclass(frozen=True)
class AdapterToSave:
    """An attached adapter with the config and the tensors that its folder will hold, and what training alone needs."""

    config: PeftConfig
    tensors: dict[str, Tensor]
    training: TrainingState

    def as_plain_lora(self, initial: Path) -> AdapterToSave:
        """The same as LoRA of twice the rank on the unchanged base weight.

        Args:
            initial: The folder of the adapter as it was before training.

        Raises:
            ConfigError: The adapter cannot be converted.
            AdapterError: The folder holds another adapter.
        """
        config, tensors = as_plain_lora(self.config, self.tensors, lambda: read_adapter(initial), str(initial))
        return AdapterToSave(config, tensors, TrainingState())

    @classmethod
    def of(
        cls,
        adapter: AttachedAdapter,
        config: PeftConfig,
        tensors: dict[str, Tensor],
        initial: str | Path | None,
        to_resume: bool,
    ) -> AdapterToSave:
        """See `PeftModel.save_pretrained`."""
        one = cls(config, tensors, adapter.training_state())
        if initial is not None:
            return one.as_plain_lora(Path(initial))
        return one if to_resume else one.on_the_base_weight(adapter)

    def on_the_base_weight(self, adapter: AttachedAdapter) -> AdapterToSave:
        """The same as LoRA of twice the rank, if its initialization has changed the base weight by data."""
        config = self.config
        if not (isinstance(config, LoraConfig) and method_of(config).needs_state(config)):
            return self
        initial = initial_tensors(cast(Adapter[LoraConfig], adapter))
        return AdapterToSave(*as_plain_lora(config, self.tensors, lambda: initial, ""), TrainingState())


def check_saving(save_directory: str | Path, safe_serialization: bool) -> None:
    """
    Raises:
        ConfigError: The files would be pickles, or the folder is a file.
    """
    if not safe_serialization:
        raise ConfigError(
            Bilingual(
                "safe_serialization = False: siliang writes safetensors only, because a pickle runs code where it is "
                "loaded. Leave it out.",
                "safe_serialization = False：siliang 只写 safetensors，因为 pickle 在加载时会运行代码。"
                "请去掉这个参数。",
            )
        )
    if Path(save_directory).is_file():
        raise ConfigError(
            Bilingual(
                f"{save_directory} is a file, and adapters are saved into a folder.",
                f"{save_directory} 是文件，而适配器保存在文件夹中。",
            )
        )


def save_adapters(save_directory: str | Path, adapters: Mapping[str, AdapterToSave]) -> None:
    """Writes "default" into the folder itself, and others into folders of their names inside it."""
    for name, one in adapters.items():
        folder = Path(save_directory) if name == "default" else Path(save_directory) / name
        save_adapter(folder, one.config, one.tensors, one.training)


def for_hub(given: dict[str, Any]) -> dict[str, Any]:
    """What the hub is asked with, of what a function was given.

    Raises:
        TypeError: There is something else.
    """
    if unknown := [key for key in given if key not in (*HUB_ARGUMENTS, *PLACING, "subfolder")]:
        unexpected = Bilingual(f"unexpected argument {unknown[0]!r}.", f"多余的参数 {unknown[0]!r}。")
        raise TypeError(together(unexpected, nearest(unknown[0], HUB_ARGUMENTS)))
    return {key: value for key, value in given.items() if key not in PLACING}
