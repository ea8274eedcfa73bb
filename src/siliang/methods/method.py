"""What a method is: how it attaches itself to a base model, and what else it does while it is trained and saved.

To add a method: one file with its equation, its config and a subclass of `Method`, and one row in `__init__.py`.
siliang.adapters puts what `attach` gives into the model and takes it out again. Other packages ask a method for its
attributes, and full fine-tuning is known by its `config` of None.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from siliang.language import Bilingual
from siliang.methods.batch_rows import BatchRows
from siliang.methods.config import PeftConfig
from siliang.methods.initialization import InitializationData
from siliang.methods.layer import LayerAdapter, MakeAdapter
from siliang.methods.prompt import Prompt
from siliang.methods.prompt_hooks import PromptSpec
from siliang.methods.targets import DefaultTargets

C = TypeVar("C", bound=PeftConfig)

NEEDS_ALL_BITS = Bilingual(
    "quantization is for a base model that stays as it is: full fine-tuning needs all its bits.",
    "量化用于保持不变的基座模型：全参数微调需要完整的权重。",
)


@dataclass(frozen=True)
class SharedSpec:
    """A tensor that several layers of one adapter share.

    Attributes:
        shape: Its shape.
        make: Makes it on a device, from the method's seed or distribution.
        trained: It is a parameter; otherwise a buffer.
        saved: The file holds it; otherwise `make` gives the same again.
    """

    shape: tuple[int, ...]
    make: Callable[[torch.device], Tensor]
    trained: bool = True
    saved: bool = True

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TableRows:
    """Rows of an embedding table, of which an adapter trains copies. A head that is tied to the table uses them too.

    Attributes:
        indices: The rows' numbers (token ids), each once.
        key: What the file calls the trained rows, (rows, D), below the table's path.
        saved_when_tied: The file holds them below a tied head's path too, as PEFT's for TRAINABLE_TOKENS does.
        at_random: They start from normal random numbers, not from the table's own rows.
    """

    indices: tuple[int, ...]
    key: str = "trainable_tokens_delta"
    saved_when_tied: bool = True
    at_random: bool = False


@dataclass(frozen=True)
class Parts:
    """What an adapter will have on a base model, by the base model's own paths. Nothing has been made yet.

    Attributes:
        layers: For each layer, a function that makes the adapter there. Its tensors must have the shapes that
            follow from the config, because they are counted before they are made.
        table_rows: For embedding tables, the rows that it trains copies of.
        parameters: Parameters of the base model that it trains copies of.
        modules: Modules of the base model that it trains copies of, in addition to those that are saved
            whole for the task or by `modules_to_save`.
        shared: Tensors that its layers share, by the names that PEFT has for them, such as `vera_A`.
        shared_parts: Parts of its layers that are parts of other layers of it: by a layer's path and the part's
            name, the path of the layer whose part it is. The file holds them for each layer, as PEFT's does.
        prompt: Its virtual tokens.
        rows: The rows of the batch, where it computes each in its own way. A batch cannot mix it with other adapters
            then.
        state: What the method keeps of it from the beginning, as in `Adapter.state`.
    """

    layers: Mapping[str, MakeAdapter] = field(default_factory=dict)
    table_rows: Mapping[str, TableRows] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    shared: Mapping[str, SharedSpec] = field(default_factory=dict)
    shared_parts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    prompt: PromptSpec | None = None
    rows: BatchRows | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Adapter(Generic[C]):
    """An adapter on its model, as its method sees it.

    Attributes:
        name: The adapter's name.
        config: Its config, complete; what a method writes into it is saved.
        parts: What its method gave for it.
        layers: The adapter on each layer, by path.
        shared: The tensors that its layers share.
        prompt: Its virtual tokens.
        state: What the method keeps between steps, such as moving averages. It is saved with a checkpoint's
            adapter, and loaded when training is resumed.
        model: The base model, with what is attached.
    """

    name: str
    config: C
    parts: Parts
    layers: Mapping[str, LayerAdapter]
    shared: Mapping[str, Tensor]
    prompt: Prompt | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    model: nn.Module | None = field(default=None, repr=False)

    @property
    def rows(self) -> BatchRows | None:
        """The rows of the batch, where it computes each in its own way."""
        return self.parts.rows


class Method(ABC, Generic[C]):
    """One way of tuning a base model. It has no state: what an adapter keeps between steps is in `Adapter.state`.

    Attributes:
        name: What the user writes in `method:`.
        config: Its config class; None for full fine-tuning, which attaches nothing.
        learning_rate: The default where the user gives none.
        learning_rate_source: Where that number is from.
        trains: What it trains, in a few words; bilingual, as the source of the rate is.
        freezes_the_base: The base model's own parameters stay as they are, and so may be stored in half precision.
        why_not_mergeable: Why what it trains cannot become a part of the base model's own weights; None where it can.
        tunes: What it must find in the model; `siliang check` reports where there are none.
        needs_settings: It tunes only what the user names, so that it is not chosen by default.
        is_baseline: The others are measured against it; it is not offered as a choice.
        has_smaller_files: A file may hold less than the adapter has: `from_file` puts the rest back.
        has_lora_factors: Its layers have LoRA's A and B, by these names: LoRA+ gives B a learning rate of its own.
        learned: Settings that training writes into the config; a checkpoint's are taken over when training is resumed.
        default_targets: The usual layers, for a method that works on layers.
    """

    name: ClassVar[str]
    config: ClassVar[type[PeftConfig] | None]
    learning_rate: ClassVar[float]
    learning_rate_source: ClassVar[str]
    trains: ClassVar[str]
    freezes_the_base: ClassVar[bool] = True
    why_not_mergeable: ClassVar[str | None] = None
    tunes: ClassVar[Literal["layers", "biases"]] = "layers"
    needs_settings: ClassVar[bool] = False
    is_baseline: ClassVar[bool] = False
    has_lora_factors: ClassVar[bool] = False
    has_smaller_files: ClassVar[bool] = False
    learned: ClassVar[tuple[str, ...]] = ()
    default_targets: ClassVar[DefaultTargets] = DefaultTargets()

    @property
    def mergeable(self) -> bool:
        """Whether a run of it can be merged into its base model."""
        return self.why_not_mergeable is None

    def why_not_merged(self, settings: Mapping[str, object]) -> str | None:
        """Why an adapter with these settings cannot be merged; None where it can."""
        return self.why_not_mergeable

    def why_not_quantized(self, config: C) -> str | None:
        """Why an adapter with this config cannot be on a quantized base model; None where it can."""
        return None

    def why_settings_not_quantized(self, settings: Mapping[str, Any]) -> str | None:
        """The same of a run's settings; full fine-tuning has no config."""
        return NEEDS_ALL_BITS if self.config is None else self.why_not_quantized(cast(C, self.config(**settings)))

    def mixes_rows(self, config: C) -> str | None:
        """What takes a mean over the rows of a batch with this config, by its name; None where nothing does.

        A row's result or gradient then depends on the other rows, and on the padding. The engine leaves the padding in,
        so that the results are those of the model itself, and says that the split of a step into batches counts.
        """
        return None

    def adds_to_the_loss(self, config: C) -> bool:
        """Whether it has a term of the loss with this config."""
        return type(self).extra_loss is not Method.extra_loss

    def prepare(self, config: C, steps: int) -> C:
        """The config of a new adapter with what follows from the training it is made for, before it is attached.

        Args:
            config: As the settings say; it is not changed.
            steps: Optimizer steps of the whole training.

        Raises:
            ConfigError: It does not go with so many steps.
        """
        return config

    def uninitialized(self, config: C) -> C | None:
        """The config of an adapter that is on the same layers, and changes nothing before it is trained; None where the
        initialization of a new adapter is not learned from data (`initialize_from_data`).
        """
        return None

    def initialize_from_data(self, model: nn.Module, config: C, adapter: Adapter[C], data: InitializationData) -> C:
        """Learns from data what an adapter begins with, and keeps it for the one that is attached next.

        Args:
            model: With `adapter` on it, which is that of `uninitialized` and is taken off afterwards.
            config: Of the adapter that is attached next.

        Returns:
            The config with which that one is attached.

        Raises:
            ConfigError: The data, or the model, is not enough for it.
        """
        return config

    def initialization_bytes(self, adapter: Adapter[C]) -> int:
        """Memory that learning the initialization of an adapter took in addition to the model and a batch, about."""
        return 0

    @abstractmethod
    def attach(self, model: nn.Module, config: C, *, saved: Sequence[str], from_file: bool) -> Parts:
        """What an adapter will have on `model`. Changes nothing but what the config leaves open.

        Args:
            model: The base model, nothing attached to it.
            config: The adapter's own copy.
            saved: The modules that are trained and saved whole for the task or by `modules_to_save`: no part may lie in
                them. They need not be among the parts.
            from_file: The adapter will be filled from a file. Some of several names may match nothing then, as in PEFT.

        Raises:
            TargetError: The method finds nothing to tune.
            ConfigError: It cannot work on this model.
        """

    def add_hooks(self, model: nn.Module, adapter: Adapter[C]) -> Callable[[], None] | None:
        """Adds what the model's forward needs outside of the layers while the adapter is active, such as a router.

        Returns:
            A function that removes it; None for nothing.
        """
        return None

    def extra_loss(self, adapter: Adapter[C]) -> Tensor | None:
        """A term of the loss, () in fp32, that is added once an optimizer step; None for none."""
        return None

    def after_step(self, adapter: Adapter[C], step: int) -> None:
        """Runs after each optimizer step, while the gradients are still there.

        Args:
            step: Optimizer steps that are done, this one included.
        """

    def needs_state(self, config: C) -> bool:
        """Whether an adapter computes with what the method keeps, so that it is read even where nothing is trained."""
        return False

    def check_state(self, adapter: Adapter[C], state: Mapping[str, Tensor], source: str) -> None:
        """
        Args:
            state: From the files of an adapter; empty where they have none.
            source: The files, for the error.

        Raises:
            AdapterError: What the adapter needs of it is missing, or has another shape.
        """

    def restore(self, adapter: Adapter[C]) -> None:
        """Puts back what the file leaves out, from the state that was loaded with it."""

    def to_file(self, config: C, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of an adapter as its file holds them, by their keys: parts that are off may be left out.

        The adapter that the saved config makes must have tensors of these names and shapes.
        """
        return tensors

    def from_file(self, config: C, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The way back: the tensors of a file, by the keys that an adapter has."""
        return tensors

    def shape_hint(self, key: str, found: Sequence[int], needed: Sequence[int]) -> str:
        """Why a tensor of a file may have another shape than the config gives it, for the error; "" for no hint.

        Args:
            key: The tensor's key in the file.
        """
        return ""
