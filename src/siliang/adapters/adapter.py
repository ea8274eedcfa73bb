"""One adapter on its model: its tensors, and what it trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from siliang.adapters.adapted_layer import ByAdapter, parts_of
from siliang.adapters.attachments import Attachments
from siliang.adapters.table_rows import RowsAdapter
from siliang.adapters.training_state import TrainingState
from siliang.methods.config import PeftConfig
from siliang.methods.layer import LayerAdapter
from siliang.methods.method import Adapter, Parts, SharedSpec
from siliang.methods.prompt import PROMPT_KEY


@dataclass(kw_only=True)
class AttachedAdapter(Adapter[PeftConfig]):
    """An adapter with its tensors, wherever in the model they are.

    Attributes:
        attachments: What adapters have in the model's modules.
    """

    attachments: Attachments = field(repr=False)

    def __post_init__(self) -> None:
        self.model = self.attachments.model

    def tensors(self) -> dict[str, Tensor]:
        """What the adapter consists of, under the keys of its file: without its name.

        The keys are the same whatever else is attached. The tensors are live, but for a prompt that comes out of an
        encoder: that one is computed.
        """
        found: dict[str, Tensor] = (
            {} if self.prompt is None else {PROMPT_KEY: self.prompt(), **self.prompt.extra_tensors()}
        )
        found |= {f"base_model.{key}": self.shared[key] for key, spec in self.parts.shared.items() if spec.saved}
        for path, layer in self.layers.items():
            found |= {self._key(path, key): t for key, t in layer.tensors().items()}
        for path in self.parts.modules:
            state = self.attachments.module_copy(path, self.name).state_dict(keep_vars=True)
            found |= {self._key(path, key): t for key, t in state.items()}
        for path in self.attachments.overridden_by(self.name):
            found[self.parameter_key(path)] = self.attachments.parameter(path, self.name)
        return found

    def repeated_keys(self) -> set[str]:
        """The keys of rows that a file may hold for tied tables once more."""
        rows = {path: one for path, one in self.layers.items() if isinstance(one, RowsAdapter) and not one.tensors()}
        return {self._key(path, one.rows.key) for path, one in rows.items()}

    def check_values(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """
        Args:
            tensors: A file's, by the keys and of the shapes of `tensors`.
            source: The file, for the error.

        Raises:
            AdapterError: A layer cannot have these values.
        """
        for path, layer in self.layers.items():
            layer.check_values({key: tensors[self._key(path, key)] for key in layer.tensors()}, f"{source}: {path}")

    def parameter_key(self, path: str) -> str:
        """The key in the file of what replaces the base model's parameter at `path`."""
        owner, _, own = path.rpartition(".")
        return self._key(f"{owner}.base_layer" if owner in self.layers else owner, own)

    def written_key(self, key: str) -> str:
        """The key that PEFT writes where this has `key` for a base parameter: around a table of which an adapter trains
        rows beside another method there is one module more.
        """
        beside = (path for path, one in self.layers.items() if isinstance(one, RowsAdapter) and not one.is_the_method)
        found = next((path for path in beside if key.startswith(self._key(path, "base_layer."))), None)
        return key if found is None else key.replace(".base_layer.", ".token_adapter.base_layer.", 1)

    def _key(self, path: str, key: str) -> str:
        prefix = "base_model.model" if self.prompt is None else "base_model"
        return f"{prefix}.{path}.{key}" if path else f"{prefix}.{key}"

    def parameters(self) -> list[nn.Parameter]:
        """What the adapter trains: without the buffers of saved modules, with the encoder of a prompt."""
        found: list[nn.Parameter] = [] if self.prompt is None else [*self.prompt.trained()]
        for key, spec in self.parts.shared.items():
            if spec.trained:
                tensor = self.shared[key]
                assert isinstance(tensor, nn.Parameter)
                found.append(tensor)
        for layer in self.layers.values():
            found += layer.parameters().values()
        for path in self.parts.modules:
            found += self.attachments.module_copy(path, self.name).parameters()
        found += (self.attachments.parameter(path, self.name) for path in self.parts.parameters)
        return list({id(p): p for p in found}.values())  # rows of a tied table are on several layers

    @property
    def is_alone(self) -> bool:
        """A batch cannot mix it with other adapters."""
        return (
            self.prompt is not None
            or self.rows is not None
            or bool(self.attachments.overridden_by(self.name))
            or not all(layer.PART_OF_A_BATCH for layer in self.layers.values())
        )

    def to_base_dtype(self) -> None:
        """Casts what the adapter trains to the dtype of the layers that it is on, or of the base model."""
        floats = (p for p in self.attachments.model.parameters() if p.is_floating_point())
        dtype = next((p.dtype for p in floats), torch.float32)
        for p in self.parameters():
            p.data = p.data.to(dtype)

    def set_trainable(self, wanted: bool) -> None:
        """Trains the adapter, or freezes it; the user's own `requires_grad` elsewhere is left alone."""
        for p in self.parameters():
            p.requires_grad_(wanted and (p.is_floating_point() or p.is_complex()))

    def training_state(self) -> TrainingState:
        """What a resumed training needs in addition to the adapter's file: a prompt's encoder, a method's state."""
        prompt = {} if self.prompt is None or self.prompt.flat else self.prompt.state_dict()
        return TrainingState(prompt, self.state)


@contextmanager
def frozen(adapters: Iterable[AttachedAdapter]) -> Iterator[None]:
    """Within the block these adapters are not trained."""
    trained = [p for adapter in adapters for p in adapter.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


class SharedTensors(Mapping[str, Tensor]):
    """The tensors that the layers of adapter `adapter` share, by name, as they are now: sharding replaces some.

    Args:
        owner: The module that holds them.
        names: Which.
    """

    def __init__(self, owner: nn.Module, names: tuple[str, ...], adapter: str) -> None:
        self._owner, self._names, self._adapter = owner, names, adapter

    def __getitem__(self, name: str) -> Tensor:
        found = parts_of(self._owner, name)[self._adapter]
        assert isinstance(found, Tensor)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def make_shared(owner: nn.Module, specs: Mapping[str, SharedSpec], adapter: str, device: torch.device) -> SharedTensors:
    """Makes the tensors that the layers of `adapter` share, and registers them on `owner`."""
    for name, spec in specs.items():
        tensor = spec.make(device)
        if name not in owner._modules:
            owner.add_module(name, ByAdapter())
        held = parts_of(owner, name)
        held[adapter] = nn.Parameter(tensor, requires_grad=False) if spec.trained else tensor
        if not spec.saved and not spec.trained:
            held.leave_out(adapter)
    return SharedTensors(owner, tuple(specs), adapter)


def share_parts(layers: Mapping[str, LayerAdapter], parts: Parts) -> None:
    """Gives layers of an adapter the parts that they have from other layers of it."""
    for path, owners in parts.shared_parts.items():
        for attribute, owner in owners.items():
            layers[path].share_part(attribute, layers[owner])
