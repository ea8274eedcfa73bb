"""What the methods share: the config that is saved beside an adapter, and the abstract wrapped layer."""

from __future__ import annotations

import dataclasses
import enum
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from siliang.files import write_text
from siliang.methods.fields import check_fields
from siliang.models.quantized import is_quantized
from siliang.safe_json import dump_json, read_values
from siliang.secrets import short_repr
from siliang.types import AdapterError, ConfigError, MergeError, PeftType, TaskType

CONFIG_NAME = "adapter_config.json"
BASE = "__base__"  # in adapter_names: no adapter
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
        modules_to_save: Endings of the names of modules trained and saved whole, beside the adapter (heads,
            embeddings). As in PEFT any ending: `head` means lm_head too.
    """

    task_type: TaskType | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, Any] | None = None
    modules_to_save: list[str] | None = None

    is_prompt_learning: ClassVar[bool] = False
    peft_type: ClassVar[PeftType]
    # Fields of PEFT that siliang does not have, at PEFT's defaults: at any other value they would change the result.
    UNSUPPORTED: ClassVar[dict[str, Any]] = {}
    AT_LEAST_1: ClassVar[tuple[str, ...]] = ()
    MOST: ClassVar[int] = 2**31  # of those numbers: no model has more of anything

    def __post_init__(self) -> None:
        check_fields(self)
        for name in self.AT_LEAST_1:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value!r}: must be at least 1.")
            if value is not None and value > self.MOST:
                raise ConfigError(f"{name} = {value!r}: must be at most {self.MOST:,}.")

    def to_dict(self) -> dict[str, Any]:
        """The config as it stands in adapter_config.json: sets become sorted lists, enums their values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values |= {"peft_type": self.peft_type, "peft_version": PEFT_FORMAT_VERSION}
        return {name: _plain(value) for name, value in sorted(values.items())}

    def to_json(self, **changed: Any) -> str:
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

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = CONFIG_NAME) -> Self:
        """Builds the config from adapter_config.json's values.

        Keys that siliang does not know are dropped with a warning.

        Raises:
            AdapterError: A value is not allowed, or a field that siliang does not support would change the result.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        kept: dict[str, Any] = {}
        for key, value in values.items():
            if key in known:
                kept[key] = value
            elif key in ("peft_type", "peft_version"):
                continue
            elif key in cls.UNSUPPORTED:
                # what is empty is off: an empty dict, or null, as older releases of PEFT wrote
                if value and value != cls.UNSUPPORTED[key] and cls.has_effect(key, values):
                    raise AdapterError(
                        f"{source}: {key} = {short_repr(value)} changes what {cls.peft_type} computes, and siliang "
                        f"does not support it (only {cls.UNSUPPORTED[key]!r})."
                    )
            elif value not in (None, False, "", [], {}):
                warnings.warn(f"{source}: unknown field {key} = {short_repr(value)} is ignored", stacklevel=3)
        empty = {f.name for f in dataclasses.fields(cls) if f.default_factory is dict}
        kept = {k: v for k, v in kept.items() if v is not None or k not in empty}  # older releases wrote null
        switches = {f.name for f in dataclasses.fields(cls) if isinstance(f.default, bool)}
        kept = {k: False if v is None and k in switches else v for k, v in kept.items()}  # as PEFT takes it
        try:
            return cls(**kept)
        except ConfigError as error:
            raise AdapterError(f"{source}: {error}") from None

    @classmethod
    def has_effect(cls, key: str, values: dict[str, Any]) -> bool:
        """Whether a field of UNSUPPORTED plays a part beside the other `values` of a file."""
        return True

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads adapter_config.json from a local adapter folder; `PeftConfig.from_pretrained` finds the class itself.

        Raises:
            AdapterError: The file is missing, is no JSON, or names a method that siliang does not have.
        """
        from siliang.methods import config_class  # the table of methods stands on this file

        path = Path(folder) / CONFIG_NAME
        missing = AdapterError(f"{folder} holds no adapter: {CONFIG_NAME} is missing there.")
        values = read_values(path, AdapterError, "cannot be read", missing=missing, foreign=True)
        if not isinstance(values, dict):
            raise AdapterError(f"{path} must hold a JSON object, not {type(values).__name__}.")
        found = config_class(values.get("peft_type"), source=str(path))
        if not issubclass(found, cls):
            raise AdapterError(f"{path} is a {found.peft_type} adapter, not {cls.__name__}.")
        return found.from_dict(values, source=str(path))  # type: ignore[return-value]


@dataclass(kw_only=True)
class LayerConfig(PeftConfig):
    """A method that wraps layers of the base model, which can therefore be named.

    Attributes:
        target_modules: Which layers: a list of name endings, a regex for the whole name, "all-linear", or None for the
            model type's defaults.
        exclude_modules: Layers left out again: name endings or a regex.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None

    # The usual targets by the base model's model_type.
    DEFAULT_TARGETS: ClassVar[dict[str, tuple[str, ...]]] = {}

    def use_defaults_of(self, model_type: str | None) -> None:
        """Fills in what else depends on the model's type."""

    @abstractmethod
    def layer_arguments(self, paths: Sequence[str]) -> list[dict[str, Any]]:
        """What the wrapped layer's `add_adapter` needs for the layer at each path.

        Raises:
            TargetError: A pattern of the config cannot be matched.
        """


# Under which names the models' configs say them, in the order in which PEFT looks.
SHAPES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}


@dataclass(kw_only=True)
class PromptConfig(PeftConfig):
    """A method that puts trained virtual tokens before the text and leaves the base model's layers alone.

    What is None is read off the base model when attaching.

    Attributes:
        num_virtual_tokens: Length of the prompt.
        token_dim: Width of a virtual token: the model's hidden size, or, for a prefix, all key/value heads together.
        num_transformer_submodules: 2 for encoder-decoders, whose files have twice the rows, otherwise 1.
        num_attention_heads: Heads; for a prefix the key/value heads.
        num_layers: Blocks of the model.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None

    is_prompt_learning: ClassVar[bool] = True
    NEEDED: ClassVar[tuple[str, ...]] = ("token_dim",)
    AT_LEAST_1: ClassVar[tuple[str, ...]] = (
        "num_virtual_tokens",
        "token_dim",
        "num_transformer_submodules",
        "num_attention_heads",
        "num_layers",
    )

    def complete(self, model_config: Any, *, width: int | None = None) -> None:
        """Fills in the shapes from the base model.

        Args:
            model_config: The base model's config.
            width: Of its word embeddings, beside which the virtual tokens stand.

        Raises:
            ConfigError: The model does not say them, or the given ones are others.
        """
        if self.num_virtual_tokens is None:
            raise ConfigError(
                f"{type(self).__name__} needs num_virtual_tokens (in a run: method.num_virtual_tokens), such as 20."
            )
        if self.num_transformer_submodules is None:
            self.num_transformer_submodules = 2 if self.task_type is TaskType.SEQ_2_SEQ_LM else 1
        if self.token_dim is None:
            self.token_dim = width
        if width is not None and self.token_dim != width:
            raise ConfigError(f"token_dim = {self.token_dim}: the model's word embeddings have {width} columns.")
        for name, names in SHAPES.items():
            if getattr(self, name) is None:
                setattr(self, name, said(model_config, names))
        for name in self.NEEDED:
            if getattr(self, name) is None:
                raise ConfigError(
                    f"{type(model_config).__name__} does not say {name}: give it in {type(self).__name__}."
                )

    @property
    def rows(self) -> int:
        """Rows of the saved table of virtual tokens."""
        assert self.num_virtual_tokens is not None
        return self.num_virtual_tokens * (self.num_transformer_submodules or 1)

    @property
    def width(self) -> int:
        """Columns of the saved table of virtual tokens, once the config is complete."""
        assert self.token_dim is not None
        return self.token_dim

    @property
    def encoder_numbers(self) -> int:
        """Parameters of what makes the table while it is trained; of a table that is trained itself its own."""
        return self.rows * self.width


def said(model_config: Any, names: Sequence[str]) -> Any:
    """What a model's config says of its text model under the first of `names` that it has; None where it has none."""
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    for name in names:
        try:
            if (value := getattr(text, name, None)) is not None:
                return value
        except Exception:  # of a config whose layers differ in it: its error is a kind of its own
            continue
    return None


class Prompt(nn.Module, ABC):
    """What makes the virtual tokens. Its `embedding` alone is left in a saved file: what trained it is flattened.

    Attributes:
        flat: The embedding is the prompt itself: there is nothing between, or it was loaded from a flattened file.
    """

    embedding: nn.Embedding
    flat: bool

    @abstractmethod
    def forward(self) -> Tensor:
        """The table of virtual tokens, (rows, width): what `prompt_embeddings` holds in the file."""

    @torch.no_grad()
    def flatten(self, table: Tensor) -> None:
        """Becomes the plain table that a file holds."""
        weight = self.embedding.weight
        for name, _ in list(self.named_children()):
            if name != "embedding":
                delattr(self, name)
        rows, width = table.shape
        self.embedding = nn.Embedding(rows, width, _weight=table.to(device=weight.device, dtype=weight.dtype))
        self.flat = True


class Rows:
    """Which adapter computes each row of the batch that is at work ("__base__": none).

    Everything attached to one model shares the object. The model's forward says how its batch stands to the names
    (`begin`), for generation repeats each row for its beams.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._now = self.names
        self._tokens: set[int] = set()

    def begin(self, batch: int, tokens: set[int]) -> None:
        """A forward begins, on a batch of so many rows of so many tokens each.

        Raises:
            ConfigError: The batch is no multiple of the names.
        """
        if batch % len(self.names):
            raise ConfigError(f"adapter_names has {len(self.names)} names for a batch of {batch}: one for each row.")
        repeat = batch // len(self.names)
        self._now, self._tokens = tuple(n for n in self.names for _ in range(repeat)), tokens

    def of(self, x: Tensor) -> tuple[str, ...]:
        """The adapter of each row of a layer's input, (B, ...) or, flattened, (B N, D).

        Raises:
            ConfigError: The input has other rows than the batch.
        """
        if len(x) == len(self._now):
            return self._now
        if x.dim() == 2 and len(x) in {len(self._now) * n for n in self._tokens}:
            return tuple(n for n in self._now for _ in range(len(x) // len(self._now)))
        raise ConfigError(
            f"adapter_names: a layer reads {len(x)} rows where the batch has {len(self._now)}, and whose they are "
            "cannot be told. Use set_adapter, one adapter at a time."
        )

    @contextmanager
    def only(self, names: Sequence[str]) -> Iterator[None]:
        """Within the block a module is at work on some rows of the batch, those of `names`."""
        before = self._now
        self._now = tuple(names)
        try:
            yield
        finally:
            self._now = before


class WrappedLayer(nn.Module, ABC):
    """A layer of the base model with named adapters beside it.

    The wrapped layer stands where the base layer stood and keeps it as `base_layer`. It calls the base layer and never
    asks what kind it is, so the same class serves full-precision and quantised layers. Adapters are made while the base
    layer has its own parameters: inject.py sees to that, and then says which of them stand there (`stand`).

    Attributes:
        active: The adapters that compute, in order.
        merged: Those that are in the base layer's own parameters; the layer computes with these alone then, as in PEFT.
        rows: For a batch that mixes adapters, the one of each row; None otherwise.
    """

    # The attributes that hold the adapters' parameters, each keyed by adapter name, in the order of the file.
    ADAPTER_ATTRIBUTES: ClassVar[tuple[str, ...]]
    # An adapter takes the layer's place, so that only one can be at work.
    EXCLUSIVE: ClassVar[bool] = False

    base_layer: Any  # nn.Linear and its quantised kin

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.rows: Rows | None = None
        # Dicts, so that nothing of them is listed among the layer's parameters.
        self._own: dict[str, nn.Parameter] = {}  # what stood where another parameter has been put
        self._merged: dict[str, nn.Parameter] = {}

    @classmethod
    @abstractmethod
    def supports(cls, layer: nn.Module) -> bool:
        """Whether `layer` is of a kind that this method can wrap."""

    @abstractmethod
    def add_adapter(self, name: str, **arguments: Any) -> None:
        """Makes the parameters of adapter `name`, from the config's values resolved for this layer."""

    @classmethod
    @abstractmethod
    def numbers(cls, layer: nn.Module, **arguments: Any) -> int:
        """How many numbers `add_adapter` makes on a layer."""

    @classmethod
    def rank(cls, layer: nn.Module, *, r: int, **arguments: Any) -> int:
        """The rank that `add_adapter` makes of a config's on a layer."""
        return r

    @abstractmethod
    def adapted(self, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with the adapters `names` at work."""

    @abstractmethod
    def merged_parameters(self, name: str) -> dict[str, Tensor]:
        """What the base layer's parameters become with adapter `name` in them."""

    def standing(self, names: Sequence[str]) -> dict[str, nn.Parameter]:
        """What must stand in the place of the base layer's own parameters while adapters `names` are at work."""
        return {}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.rows is None:
            return self.adapted(() if self.merged else self.active, x, *args, **kwargs)

        def run(name: str, part: Tensor) -> Tensor:
            with self._beside([name]):
                return self.adapted([name], part, *args, **kwargs)

        return by_row(self.rows.of(x), x, run)

    def has(self, name: str) -> bool:
        """Whether this layer has adapter `name`."""
        return any(name in getattr(self, attribute) for attribute in self.ADAPTER_ATTRIBUTES)

    @property
    def is_empty(self) -> bool:
        """Whether this layer has no adapter."""
        return not any(getattr(self, attribute) for attribute in self.ADAPTER_ATTRIBUTES)

    def delete_adapter(self, name: str) -> None:
        """Forgets adapter `name`, if this layer has it."""
        for attribute in self.ADAPTER_ATTRIBUTES:
            held = getattr(self, attribute)
            if name in held:
                del held[name]

    # ---- which parameters stand in the base layer ----

    def stand(self, names: tuple[str, ...], *, merged: bool) -> None:
        """Makes `names` the adapters that compute, or puts the merged ones into the base layer's parameters."""
        self.lay_down()
        self.active = names
        for key, parameter in (self._merged if merged and self.merged else self.standing(names)).items():
            self._put(key, parameter)

    def lay_down(self) -> None:
        """Gives the base layer the parameters back that others have been put in the place of."""
        for key, parameter in self._own.items():
            setattr(self.base_layer, key, parameter)
        self._own.clear()

    def beneath(self, key: str) -> nn.Parameter:
        """The base layer's parameter, whatever this layer has put in its place."""
        return self._own[key] if key in self._own else getattr(self.base_layer, key)

    def _put(self, key: str, parameter: nn.Parameter) -> None:
        self._own.setdefault(key, getattr(self.base_layer, key))
        setattr(self.base_layer, key, parameter)

    @contextmanager
    def _beside(self, names: Sequence[str]) -> Iterator[None]:
        try:
            for key, parameter in self.standing(names).items():
                self._put(key, parameter)
            yield
        finally:
            self.lay_down()

    def check_merge(self, names: Sequence[str]) -> None:
        """Before anything is merged.

        Raises:
            MergeError: The base layer is quantised.
        """
        if is_quantized(self.base_layer) and any(self.has(name) for name in names):
            raise MergeError(
                "The base model is quantised, and rounding the merged weights to it again would change the answers: "
                "load the base model in 16 bits, attach the adapter, and merge there (`siliang merge` does)."
            )

    @torch.no_grad()
    def merge(self, names: Sequence[str], *, safe: bool = False) -> dict[str, nn.Parameter]:
        """The base layer's parameters with the adapters of `names` that this layer has in them, one after another.

        They are new ones, so that a parameter that is tied to another layer's leaves that one as it is. The base layer
        must have its own parameters, and has them again behind it.

        Args:
            safe: Refuse where the result is not finite.

        Raises:
            MergeError: With `safe`, an adapter is broken; or the base layer lacks a parameter to merge into.
        """
        here = [name for name in names if self.has(name)]
        dtype = self.base_layer.weight.dtype
        found: dict[str, nn.Parameter] = {}
        with self._beside(here):
            for name in here:
                for key, value in self.merged_parameters(name).items():
                    if getattr(self.base_layer, key) is None:
                        raise MergeError(f"Adapter {name!r} has a {key}, and the layer has none to merge it into.")
                    # one rounding, at the end: what comes after is formed in the wider dtype too
                    self._put(key, nn.Parameter(value, requires_grad=False))
                    found[key] = nn.Parameter(value.to(dtype), requires_grad=False)
                    if safe and not torch.isfinite(found[key]).all():
                        raise MergeError(f"Adapter {name!r} is broken: merged weights would not be finite.")
        return found

    def hold_merged(self, names: Sequence[str], parameters: dict[str, nn.Parameter]) -> None:
        """Takes what `merge` gave; `stand` puts it where the model reads it."""
        self.merged, self._merged = tuple(name for name in names if self.has(name)), parameters

    def aside(self) -> Iterator[nn.Parameter]:
        """The parameters that belong to the layer and are not listed among its own, for they do not stand there now."""
        yield from self._own.values()
        yield from self._merged.values()

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


def by_row(names: Sequence[str], x: Tensor, run: Callable[[str, Tensor], Tensor]) -> Tensor:
    """A batch that mixes adapters: each adapter's rows go through `run` together, and come back in their order.

    Args:
        names: The adapter of each row.
        x: (B, ...).
    """
    out: Tensor | None = None
    for name in dict.fromkeys(names):
        index = torch.tensor([i for i, n in enumerate(names) if n == name], device=x.device)
        part = run(name, x[index])
        if out is None:
            out = part.new_empty((len(x), *part.shape[1:]))
        out = out.index_copy(0, index, part)
    assert out is not None
    return out


def trained_dtype(reference: Tensor) -> torch.dtype:
    """The dtype to train beside `reference`: fp32 beside half precision, where Adam's steps would vanish."""
    return torch.float32 if not reference.is_floating_point() or reference.itemsize < 4 else reference.dtype


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value
