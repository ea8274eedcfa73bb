"""The config in an adapter's folder: what is common to every method's, and to those that work on layers."""

from __future__ import annotations

import dataclasses
import enum
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from siliang.files import write_text
from siliang.hub import adapter_folder
from siliang.language import Bilingual, local
from siliang.methods.fields import check_fields
from siliang.peft_checks import refresh
from siliang.safety.safe_json import dump_json, read_values
from siliang.secrets import short_repr
from siliang.types import ADAPTER_CONFIG, AdapterError, ConfigError, TaskType, message_of

CONFIG_NAME = ADAPTER_CONFIG
BASE = "__base__"  # in adapter_names: no adapter
_OF_THE_BASE = frozenset({"base_model_name_or_path", "revision", "auto_mapping", "inference_mode"})
PEFT_FORMAT_VERSION = "0.21.2"


if TYPE_CHECKING:  # which reads the fields
    _ConfigClass = type
else:

    class _ConfigClass(type):
        """A config's class: what follows from it can be an argument all the same, as in PEFT."""

        def __call__(cls, *args, peft_type=None, peft_version=None, **kwargs):
            """
            Args:
                peft_type: The method's name, which must be that of the class.
                peft_version: Without effect: a file has the release whose format it is in.
            """
            own = getattr(cls, "peft_type", None)
            if peft_type is not None and peft_type != own:
                raise ConfigError(
                    Bilingual(
                        f"peft_type = {short_repr(peft_type)}: {cls.__name__} is for {own}. Leave it out.",
                        f"peft_type = {short_repr(peft_type)}：{cls.__name__} 用于 {own}。请去掉它。",
                    )
                )
            return super().__call__(*args, **kwargs)


@dataclass(kw_only=True)
class PeftConfig(metaclass=_ConfigClass):
    """What is common to every method's config; the names and defaults are those of PEFT.

    Attributes:
        task_type: What the base model does; decides which head is trained and saved too. None: any nn.Module.
        base_model_name_or_path: The base model's folder or hub name; filled in when attaching.
        revision: The base model's revision on the hub.
        inference_mode: The adapter is not to be trained. Always true in a saved file.
        auto_mapping: With task_type None, the base model's class and library; filled in when attaching.
        modules_to_save: Endings of the names of modules trained and saved whole with the adapter (heads,
            embeddings). As in PEFT any ending: `head` means lm_head too.
    """

    task_type: TaskType | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, object] | None = None
    modules_to_save: list[str] | None = None

    is_prompt_learning: ClassVar[bool] = False  # it has virtual tokens
    has_own_length: ClassVar[bool] = False  # of a prompt: other settings give the number of virtual tokens
    is_prefix: ClassVar[bool] = False  # before the keys and values, not before the text
    peft_type: ClassVar[str]  # the method's name in adapter_config.json
    peft_version: ClassVar[str] = PEFT_FORMAT_VERSION  # the release whose files ours equal
    # Fields of PEFT that siliang does not have, at PEFT's defaults: at any other value they would change the result.
    UNSUPPORTED: ClassVar[dict[str, object]] = {}
    # Fields that PEFT's config of this method lacks: a file has them where they are set.
    NOT_IN_PEFT: ClassVar[tuple[str, ...]] = ()
    # Fields that a run cannot set, each with the reason.
    NOT_IN_RUNS: ClassVar[Mapping[str, Bilingual]] = {}
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ()
    MOST: ClassVar[int] = 2**31  # of those numbers: no model has more of anything
    PROBABILITIES: ClassVar[tuple[str, ...]] = ()  # of leaving something out during training
    # Fields that may name files or folders: `a`, `a.b` for the setting b of a group a, `a.*` for all in a mapping a.
    FILES: ClassVar[tuple[str, ...]] = ()
    FORMER_TYPES: ClassVar[tuple[str, ...]] = ()  # names of the method in files of older releases of PEFT

    def __post_init__(self) -> None:
        refresh()  # TRL's trainers take it as peft_config
        check_fields(self)
        for name in self.AT_LEAST_1:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    Bilingual(f"{name} = {value!r}: must be at least 1.", f"{name} = {value!r}：至少为 1。")
                )
            if value is not None and value > self.MOST:
                raise ConfigError(
                    Bilingual(
                        f"{name} = {value!r}: must be at most {self.MOST:,}.",
                        f"{name} = {value!r}：最大为 {self.MOST:,}。",
                    )
                )
        for name in self.PROBABILITIES:
            if not 0.0 <= (value := getattr(self, name)) < 1.0:
                raise ConfigError(
                    Bilingual(
                        f"{name} = {value!r}: must be at least 0 and less than 1.",
                        f"{name} = {value!r}：须大于等于 0 且小于 1。",
                    )
                )

    def to_dict(self) -> dict[str, object]:
        """The config as adapter_config.json has it: sets become sorted lists, enums their values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values = {name: v for name, v in values.items() if v is not None or name not in self.NOT_IN_PEFT}
        values |= {"peft_type": self.peft_type, "peft_version": PEFT_FORMAT_VERSION}
        return {name: _plain(value) for name, value in sorted(values.items())}

    @classmethod
    def with_files(cls, values: Mapping[str, object], change: Callable[[str], str | None]) -> dict[str, object]:
        """Fields of a config with other names for the files and folders that they name.

        Args:
            change: Maps a name to its new one.
        """
        changed = dict(values)
        for field in cls.FILES:
            name, _, inner = field.partition(".")
            value = changed.get(name)
            if isinstance(value, str) and value and not inner:
                changed[name] = change(value)
            elif isinstance(value, Mapping):
                own = {key: one for key, one in value.items() if inner in (key, "*") and isinstance(one, str) and one}
                changed[name] = dict(value) | {key: change(one) for key, one in own.items()}
        return changed

    def to_json(self, **changed: object) -> str:
        """The text of adapter_config.json, its keys sorted, without secrets: a base model's name may hold one.

        Args:
            changed: Values other than the config's own.
        """
        return dump_json(self.to_dict() | changed, indent=2, sort_keys=True, ascii_only=True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes adapter_config.json into `folder`: the config as it is, to make new adapters from."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / CONFIG_NAME, self.to_json())

    def check_same(self, other: PeftConfig, *, source: str, name: str) -> None:
        """Checks that weights trained with config `other` compute the same in an adapter with this one.

        Args:
            source: The file of `other`, for the error.
            name: The adapter's name, for the error.

        Raises:
            ConfigError: A setting of the method differs.
        """
        own, others = self.to_dict(), other.to_dict()
        for key in sorted((own.keys() | others.keys()) - _OF_THE_BASE):
            if own.get(key) != others.get(key):
                raise ConfigError(
                    Bilingual(
                        f"{source}: {key} = {short_repr(others.get(key))}, and adapter {name!r} of the model has "
                        f"{short_repr(own.get(key))}: load it under another name, or delete_adapter({name!r}) first.",
                        f"{source}：{key} = {short_repr(others.get(key))}，而模型的适配器 {name!r} 中是 "
                        f"{short_repr(own.get(key))}：请用另一个名称加载，或先调用 delete_adapter({name!r})。",
                    )
                )

    @classmethod
    def from_dict(cls, values: dict[str, object], *, source: str = CONFIG_NAME) -> Self:
        """Builds the config from adapter_config.json's values.

        Keys that siliang does not know are dropped with a warning.

        Raises:
            AdapterError: A value is not allowed, or a field that siliang does not support would change the result.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        kept: dict[str, Any] = {}  # `cls` checks the types
        ignored: list[str] = []
        for key, value in values.items():
            if key in known:
                kept[key] = value
            elif key in ("peft_type", "peft_version"):
                continue
            elif key in cls.UNSUPPORTED:
                # what is empty is off: an empty dict, or null, as older releases of PEFT wrote
                if value and value != cls.UNSUPPORTED[key] and cls.has_effect(key, values):
                    raise AdapterError(
                        Bilingual(
                            f"{source}: {key} = {short_repr(value)} changes what {cls.peft_type} computes, and siliang "
                            f"does not support it (only {cls.UNSUPPORTED[key]!r}).",
                            f"{source}：{key} = {short_repr(value)} 会改变 {cls.peft_type} 的计算，"
                            f"siliang 不支持（只支持 {cls.UNSUPPORTED[key]!r}）。",
                        )
                    )
            elif value not in (None, False, "", [], {}):
                ignored.append(f"{key} = {short_repr(value)}")
        if ignored:
            message = Bilingual(
                f"{source}: unknown fields are ignored: {', '.join(ignored)}.",
                f"{source}：未知的字段不起作用：{'、'.join(ignored)}。",
            )
            warnings.warn(message, stacklevel=3)
        empty = {f.name for f in dataclasses.fields(cls) if f.default_factory is dict}
        kept = {k: v for k, v in kept.items() if v is not None or k not in empty}  # older releases wrote null
        switches = {f.name for f in dataclasses.fields(cls) if isinstance(f.default, bool)}
        kept = {k: False if v is None and k in switches else v for k, v in kept.items()}  # as PEFT takes it
        try:
            return cls(**kept)
        except ConfigError as error:
            raise AdapterError(Bilingual(f"{source}: {error}", f"{source}：{local(message_of(error), 'zh')}")) from None

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """The config of the method that `peft_type` names, or of this class, from its fields.

        Raises:
            AdapterError: siliang has no such method.
            ConfigError: A field is not allowed.
        """
        return (config_class(kwargs["peft_type"], source="peft_type") if "peft_type" in kwargs else cls)(**kwargs)

    @classmethod
    def from_json_file(cls, path_json_file: str | Path) -> dict[str, object]:
        """What a file such as adapter_config.json holds, without settings that are not for files.

        Raises:
            AdapterError: The file is missing, or holds no JSON object.
        """
        path = Path(path_json_file)
        values = _json_object(path, AdapterError(Bilingual(f"There is no file {path}.", f"找不到文件 {path}。")))
        return {key: value for key, value in values.items() if key != "runtime_config"}

    @classmethod
    def has_effect(cls, key: str, values: dict[str, object]) -> bool:
        """Whether a field of UNSUPPORTED has an effect with the other `values` of a file."""
        return True

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **hub: Any
    ) -> Self:
        """Reads adapter_config.json; `PeftConfig.from_pretrained` finds the class itself.

        Args:
            pretrained_model_name_or_path: The adapter's folder, or its name on the hub.
            subfolder: The adapter is in this folder there.
            hub: What the hub is asked with, such as `revision` and `token`.

        Raises:
            AdapterError: The file is missing, is not JSON, or names a method that siliang does not have.
        """
        folder = adapter_folder(pretrained_model_name_or_path, subfolder, **hub)
        path = folder / CONFIG_NAME
        missing = AdapterError(
            Bilingual(
                f"{folder} holds no adapter: {CONFIG_NAME} is missing there.",
                f"{folder} 中没有适配器：缺少 {CONFIG_NAME}。",
            )
        )
        values = _json_object(path, missing)
        found = config_class(values.get("peft_type"), source=str(path))
        if not issubclass(found, cls):
            raise AdapterError(
                Bilingual(
                    f"{path} is a {found.peft_type} adapter, not {cls.__name__}.",
                    f"{path} 是 {found.peft_type} 的适配器，不是 {cls.__name__}。",
                )
            )
        return found.from_dict(values, source=str(path))


@dataclass(kw_only=True)
class LayerConfig(PeftConfig):
    """The config of a method that works on layers of the base model, which can therefore be named.

    Attributes:
        target_modules: Which layers: a list of name endings, a regex for the whole name, "all-linear", or None for the
            model type's defaults.
        exclude_modules: Layers left out again: name endings or a regex.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None


# every peft_type of PEFT 0.21
OF_PEFT = frozenset(
    (
        *("ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "C3A", "CARTRIDGE", "CPT", "DEFT", "DELORA"),
        *("FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR"),
        *("LORA", "MISS", "MULTITASK_PROMPT_TUNING", "OFT", "OSF", "PEANUT", "POLY", "PREFIX_TUNING"),
        *("PROMPT_TUNING", "PSOFT", "PVERA", "P_TUNING", "RANDLORA", "ROAD", "SHADOW", "SHIRA", "SUPERTUNING"),
        *("TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT", "XLORA"),
    )
)
CONFIG_CLASSES: dict[str, type[PeftConfig]] = {}  # by peft_type: siliang.methods fills it from its table of methods


def config_class(peft_type: object, *, source: str) -> type[PeftConfig]:
    """The config class for the `peft_type` of an adapter file.

    Args:
        source: Where the type is from, for the error.

    Raises:
        AdapterError: siliang has no such method.
    """
    name = str(peft_type)
    if name.upper() in OF_PEFT and name.upper() not in CONFIG_CLASSES:
        raise AdapterError(
            Bilingual(
                f"{source}: peft_type {peft_type!r} is a method of PEFT that siliang does not have: use PEFT for it.",
                f"{source}：peft_type {peft_type!r} 是 PEFT 的方法，siliang 没有，请使用 PEFT。",
            )
        )
    if name not in CONFIG_CLASSES:
        hint = f" Write {name.upper()!r}." if name.upper() in CONFIG_CLASSES else ""
        raise AdapterError(
            Bilingual(
                f"{source}: peft_type {peft_type!r} is not a method of siliang ({', '.join(CONFIG_CLASSES)}).{hint}",
                f"{source}：siliang 没有 peft_type {peft_type!r} 这种方法（可用："
                f"{'、'.join(CONFIG_CLASSES)}）。{local(hint, 'zh')}",
            )
        )
    return CONFIG_CLASSES[name]


def _json_object(path: Path, missing: AdapterError) -> dict[str, object]:
    """
    Args:
        missing: The error where there is no such file.

    Raises:
        AdapterError: The file cannot be read, or holds something else.
    """
    values = read_values(path, AdapterError, Bilingual("cannot be read", "无法读取"), missing=missing, foreign=True)
    if isinstance(values, dict):
        return values
    raise AdapterError(
        Bilingual(
            f"{path} must hold a JSON object, not {type(values).__name__}.",
            f"{path} 应为一个 JSON 对象，而不是 {type(values).__name__}。",
        )
    )


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # a group of settings
        return {name: _plain(own) for name, own in dataclasses.asdict(value).items()}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value
