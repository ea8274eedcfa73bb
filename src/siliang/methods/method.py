"""What a method is: how it attaches itself to a base model, and what else it does while it is trained and saved.

To add a method: one file with its equation, its config and a subclass of `Method`, and one row in `__init__.py`.
inject.py places what `attach` gives and takes it off again; nothing else of the project knows one method from another.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from siliang.methods.config import PeftConfig
from siliang.methods.layer import LayerAdapter, LayerSpec, SharedTensors
from siliang.methods.prompt import Prompt
from siliang.methods.route import PromptSpec
from siliang.types import ConfigError

C = TypeVar("C", bound=PeftConfig)


@dataclass(frozen=True)
class SharedSpec:
    """A tensor that several layers of one adapter share.

    Attributes:
        shape: Its shape.
        make: Makes it on a device, from the seed or the distribution that the method says.
        trained: It is a parameter; otherwise a buffer.
        saved: The file holds it; otherwise `make` gives the same again.
    """

    shape: tuple[int, ...]
    make: Callable[[torch.device], Tensor]
    trained: bool = True
    saved: bool = True

    @property
    def numbers(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Parts:
    """What an adapter will have on a base model, by the base model's own paths. Nothing has been made yet.

    Attributes:
        layers: What it will be on each layer.
        parameters: Parameters of the base model that it trains copies of, which stand in their places.
        modules: Modules of the base model that it trains copies of, which stand in their places. inject.py adds those
            that are saved whole for the task or by `modules_to_save`.
        shared: Tensors that its layers share, by the names that PEFT has for them, such as `vera_A`.
        prompt: Its virtual tokens.
    """

    layers: Mapping[str, LayerSpec] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    shared: Mapping[str, SharedSpec] = field(default_factory=dict)
    prompt: PromptSpec | None = None

    @property
    def all(self) -> tuple[str, ...]:
        """Every path."""
        return (*self.layers, *self.parameters, *self.modules)


@dataclass(frozen=True)
class Attached(Generic[C]):
    """An adapter on its model, as its method sees it.

    Attributes:
        name: The adapter's.
        config: Its config, complete; what a method writes into it is saved.
        layers: Its part on each layer, by path.
        shared: The tensors that its layers share.
        prompt: Its virtual tokens.
        state: What the method remembers between steps, such as moving averages. It is saved beside a checkpoint's
            adapter, and there again when training is resumed.
    """

    name: str
    config: C
    layers: Mapping[str, LayerAdapter]
    shared: SharedTensors
    prompt: Prompt | None
    state: dict[str, Tensor]


class Method(ABC, Generic[C]):
    """One way of tuning a base model. It has no state: what an adapter remembers is in `Attached.state`.

    Attributes:
        name: What the user writes in `method:`.
        config: Its config class; None for full fine-tuning, which attaches nothing.
        learning_rate: The default where the user gives none.
        learning_rate_source: Where that figure is from.
        trains: What it trains, in a few words; Bilingual, as the source of the rate is.
        freezes_the_base: The base model's own parameters stay as they are, and so may be stored in half precision.
        why_not_mergeable: Why what it trains cannot become a part of the base model's own weights; None where it can.
        tunes: What it needs to find in the model, for the findings of `siliang check`.
        is_baseline: The others are measured against it; it is not offered as a choice.
        default_targets: The usual layers by the base model's model_type, for a method that works on layers.
    """

    name: ClassVar[str]
    config: ClassVar[type[PeftConfig] | None]
    learning_rate: ClassVar[float]
    learning_rate_source: ClassVar[str]
    trains: ClassVar[str]
    freezes_the_base: ClassVar[bool] = True
    why_not_mergeable: ClassVar[str | None] = None
    tunes: ClassVar[Literal["layers", "biases"]] = "layers"
    is_baseline: ClassVar[bool] = False
    default_targets: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @property
    def mergeable(self) -> bool:
        """Whether a run of it can be merged into its base model."""
        return self.why_not_mergeable is None

    @property
    def adds_to_the_loss(self) -> bool:
        """Whether it has a term of the loss."""
        return type(self).extra_loss is not Method.extra_loss

    @abstractmethod
    def attach(self, model: nn.Module, config: C, *, saved: Sequence[str], from_file: bool) -> Parts:
        """What an adapter will have on `model`. Changes nothing but what the config leaves open.

        Args:
            model: The base model, nothing attached to it.
            config: The adapter's own copy.
            saved: The modules that are trained and saved whole for the task or by `modules_to_save`: nothing in them
                can be tuned otherwise. They need not be among the parts.
            from_file: The adapter will be filled from a file. Some of several names may match nothing then, as in PEFT.

        Raises:
            TargetError: The method finds nothing to tune.
            ConfigError: It cannot work on this model.
        """

    def stand(self, model: nn.Module, adapter: Attached[C]) -> Callable[[], None] | None:
        """Puts on what must be in the model's forward, beside the layers, while the adapter is at work: hooks.

        Returns:
            What takes it off again; None for nothing.
        """
        return None

    def extra_loss(self, adapter: Attached[C]) -> Tensor | None:
        """A term of the loss, () in fp32, that is added once an optimizer step; None for none."""
        return None

    def after_step(self, adapter: Attached[C], step: int) -> None:
        """Runs after each optimizer step, while the gradients are still there.

        Args:
            step: Optimizer steps that are done, this one included.
        """

    def to_file(self, config: C, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of an adapter as its file holds them, by their keys: parts that are off may be left out.

        The adapter that the saved config makes must have tensors of these names and shapes.
        """
        return tensors

    def on_the_plain_base(
        self, config: C, tensors: dict[str, Tensor], start: Callable[[], dict[str, Tensor]], source: str
    ) -> tuple[C, dict[str, Tensor]]:
        """An adapter that took something out of the base weight, as one beside the base weight as it was.

        Args:
            start: Reads the adapter as it was before training.
            source: From where, for an error.

        Raises:
            ConfigError: The adapter cannot be turned into such a one.
            AdapterError: What was read is another adapter.
        """
        raise ConfigError(f"Only LoRA can be turned into LoRA on the plain base model, not {config.peft_type}.")

    def why_other_shape(self, key: str, found: Sequence[int], needed: Sequence[int]) -> str:
        """What the method knows of a tensor of a file whose shape is not the one that its config makes; "" for nothing.

        Args:
            key: The tensor's key in the file.
        """
        return ""
