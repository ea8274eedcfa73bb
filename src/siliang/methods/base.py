"""What the methods share: the config that is saved beside an adapter, and the abstract wrapped layer."""

from __future__ import annotations

import dataclasses
import enum
import json
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from siliang.types import AdapterError, ConfigError, PeftType, TaskType, nearest

CONFIG_NAME = "adapter_config.json"
PEFT_FORMAT_VERSION = "0.21.2"  # the release of PEFT whose files ours equal


@dataclass(kw_only=True)
class PeftConfig:
    """What is common to every method's config; the names and defaults are those of PEFT.

    Attributes:
        task_type: What the base model does; decides which head is trained and saved along. None: any nn.Module.
        base_model_name_or_path: The base model's folder or hub name; filled in when attaching.
        revision: The base model's revision on the hub.
        inference_mode: The adapter is not to be trained. Always true in a saved file.
        auto_mapping: With task_type None, the base model's class and library; filled in when attaching.
    """

    task_type: TaskType | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, str] | None = None

    peft_type: ClassVar[PeftType]
    # Fields of PEFT that siliang does not have, at PEFT's defaults: at any other value they would change the result.
    UNSUPPORTED: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        if self.task_type is not None:
            try:
                self.task_type = TaskType(self.task_type)
            except ValueError:
                raise ConfigError(
                    f"task_type {self.task_type!r} is not one of {', '.join(TaskType)}."
                    + nearest(str(self.task_type), TaskType)
                ) from None

    def to_dict(self) -> dict[str, Any]:
        """The config as it stands in adapter_config.json: sets become sorted lists, enums their values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values |= {"peft_type": self.peft_type, "peft_version": PEFT_FORMAT_VERSION}
        return {name: _plain(value) for name, value in sorted(values.items())}

    def to_json(self) -> str:
        """The text of adapter_config.json: keys sorted, inference_mode true, as PEFT writes it."""
        return json.dumps(self.to_dict() | {"inference_mode": True}, indent=2, sort_keys=True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes adapter_config.json into `folder`."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_NAME).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = CONFIG_NAME) -> Self:
        """Builds the config from adapter_config.json's values.

        Keys that siliang does not know are dropped with a warning.

        Raises:
            AdapterError: A field that siliang does not support has a value that would change the result.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        kept: dict[str, Any] = {}
        for key, value in values.items():
            if key in known:
                kept[key] = value
            elif key in ("peft_type", "peft_version"):
                continue
            elif key in cls.UNSUPPORTED:
                # PEFT writes an empty dict where an older release wrote null
                if value != cls.UNSUPPORTED[key] and (value or cls.UNSUPPORTED[key]):
                    raise AdapterError(
                        f"{source}: {key} = {value!r} changes what {cls.peft_type} computes, and siliang does not "
                        f"support it (only {cls.UNSUPPORTED[key]!r})."
                    )
            elif value not in (None, False, "", [], {}):
                warnings.warn(f"{source}: unknown field {key} = {value!r} is ignored", stacklevel=3)
        try:
            return cls(**kept)
        except TypeError as error:
            raise AdapterError(f"{source}: {error}") from error

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads adapter_config.json from a local adapter folder; `PeftConfig.from_pretrained` finds the class itself.

        Raises:
            AdapterError: The file is missing, is no JSON, or names a method that siliang does not have.
        """
        from siliang.methods import config_class  # the table of methods stands on this file

        path = Path(folder) / CONFIG_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise AdapterError(f"{folder} holds no adapter: {CONFIG_NAME} is missing there.") from None
        except (ValueError, OSError) as error:
            raise AdapterError(f"{path} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise AdapterError(f"{path} must hold a JSON object, not {type(values).__name__}.")
        found = config_class(values.get("peft_type"), source=str(path))
        if not issubclass(found, cls):
            raise AdapterError(f"{path} is a {found.peft_type} adapter, not {cls.__name__}.")
        return found.from_dict(values, source=str(path))  # type: ignore[return-value]


@dataclass(kw_only=True)
class LayerConfig(PeftConfig):
    """A method that works inside the base model's layers, which can therefore be named.

    Attributes:
        modules_to_save: Name endings of modules trained and saved whole, beside the adapter (heads, embeddings).
    """

    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.modules_to_save, str):
            raise ConfigError(f"modules_to_save must be a list of names, not the string {self.modules_to_save!r}.")


class WrappedLayer(nn.Module, ABC):
    """A layer of the base model with named adapters beside it.

    The wrapped layer stands where the base layer stood and keeps it as `base_layer`. It calls the base layer and never
    asks what kind it is, so the same class serves full-precision and quantised layers.
    """

    # The attributes that hold the adapters' parameters, each keyed by adapter name, in the order of the file.
    ADAPTER_ATTRIBUTES: ClassVar[tuple[str, ...]]

    base_layer: Any  # nn.Linear and its quantised kin

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()

    @classmethod
    @abstractmethod
    def supports(cls, layer: nn.Module) -> bool:
        """Whether `layer` is of a kind that this method can wrap."""

    @abstractmethod
    def add_adapter(self, name: str, **arguments: Any) -> None:
        """Makes the parameters of adapter `name`, from the config's values resolved for this layer."""

    @abstractmethod
    def delete_adapter(self, name: str) -> None:
        """Forgets adapter `name`, if this layer has it."""

    @abstractmethod
    def merge(self, name: str) -> None:
        """Adds adapter `name` into the base layer's own weights."""

    @property
    def weight(self) -> Tensor:  # some models read `dense.weight` of a layer they think is plain
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of adapter `name` under their names in the file, such as `lora_A.weight`."""
        found = {}
        for attribute in self.ADAPTER_ATTRIBUTES:
            held = getattr(self, attribute)
            if name not in held:
                continue
            item = held[name]
            if isinstance(item, nn.Parameter):
                found[attribute] = item
            else:
                found |= {f"{attribute}.{key}": p for key, p in item.named_parameters()}
        return found


def trained_dtype(reference: Tensor) -> torch.dtype:
    """The dtype to train beside `reference`: fp32 beside half precision, where Adam's steps would vanish."""
    return torch.float32 if not reference.is_floating_point() or reference.itemsize < 4 else reference.dtype


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value
