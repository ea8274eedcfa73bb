"""What adapters have in a base model's modules: layers with adapters, copies of whole modules, and parameters that
replace its own. Which adapters there are and what they may do together is injection.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from siliang.adapters.adapted_attention import AdaptedAttention
from siliang.adapters.adapted_layer import AdaptedLayer
from siliang.adapters.modules_to_save import ModulesToSaveWrapper, resized_module
from siliang.adapters.parameter_override import ParameterOverride, Places, places_of, resized
from siliang.adapters.replication import Replication, replicated
from siliang.adapters.table_rows import RowsAdapter, make_table_rows, tied_layers
from siliang.adapters.tied_weights import replace_module
from siliang.language import Bilingual
from siliang.methods.adapter_names import AdapterNames
from siliang.methods.config import PeftConfig
from siliang.methods.method import TableRows
from siliang.models.introspect import is_multihead_attention, is_routed, output_layer, word_embeddings
from siliang.module_paths import inside
from siliang.types import ConfigError


class Attachments:
    """Everything that adapters have in the modules of one base model.

    Attributes:
        model: The base model.
        layers: Its layers with adapters, by path.
        modules_to_save: Its modules of which adapters have copies of their own, by path.
        overrides: Its parameters of which adapters have copies of their own, by path.
        replication: Its replicated layers, in the place of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, AdaptedLayer] = {}
        self.modules_to_save: dict[str, ModulesToSaveWrapper] = {}
        self.overrides: dict[str, ParameterOverride] = {}
        self.replication: Replication | None = None

    # ---- the bare base model, and which adapters are active ----

    def detach(self) -> None:
        """Makes the base model what it was: its own modules under their own paths, its own parameters."""
        self.restore_parameters()
        for path in self._replaced_paths():
            replace_module(self.model, path, self._base_module(path))

    def reattach(self) -> None:
        """Undoes `detach`, and puts what has been added since into the model."""
        for path in reversed(self._replaced_paths()):
            module = self.layers.get(path, self.model.get_submodule(path))
            if path in self.modules_to_save:
                self.modules_to_save[path].original_module = module
                module = self.modules_to_save[path]
            replace_module(self.model, path, module)

    def restore_parameters(self) -> None:
        """Gives the base model's modules their own parameters."""
        for layer in self.layers.values():
            layer.restore_base()
        self._activate_overrides(())

    def apply_state(
        self, active: tuple[str, ...], merged: tuple[str, ...], rows: AdapterNames | None, *, disabled: bool
    ) -> None:
        """Lets these adapters compute, and no others.

        Args:
            active: The active ones.
            merged: Those that are in the weights.
            rows: For a batch that mixes adapters, the one of each row.
            disabled: The base model computes alone.
        """
        for layer in self.layers.values():
            layer.restore_base()
        base_alone = disabled or rows is not None
        self._activate_overrides(() if base_alone else (*merged, *active))
        for layer in self.layers.values():
            layer.activate(active, disabled=base_alone)
            layer.rows = rows
        computing = () if base_alone else active
        for wrapper in self.modules_to_save.values():
            wrapper.active = next((n for n in computing if n in wrapper.modules_to_save), None)
            wrapper.rows = rows
            wrapper.active_adapters = [n for n in active if n in wrapper.modules_to_save]
            wrapper.disable_adapters = base_alone

    def _activate_overrides(self, names: Sequence[str]) -> None:
        for override in self.overrides.values():
            override.activate(next((n for n in names if n in override.adapters), None))

    def _replaced_paths(self) -> list[str]:
        """Where a module of the base model is replaced, the outer ones first."""
        return sorted({*self.layers, *self.modules_to_save}, key=lambda path: (path.count("."), path))

    def _base_module(self, path: str) -> nn.Module:
        return self.layers[path].base_layer if path in self.layers else self.modules_to_save[path].original_module

    def parked_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that are not in the model now, and must move with it all the same."""
        for holder in (*self.layers.values(), *self.overrides.values()):
            yield from holder.parked_parameters()

    # ---- attaching an adapter, and removing it: the base model must be bare ----

    @contextmanager
    def replicated_for(self, name: str, config: PeftConfig, others: Sequence[str]) -> Iterator[None]:
        """As `replicated`. An adapter with replicated layers excludes other adapters.

        Raises:
            ConfigError: There is one already.
        """
        if self.replication is not None:
            own = self.replication.adapter
            raise ConfigError(
                Bilingual(
                    f"Adapter {own!r} has layer_replication, and is the only one on its model: delete_adapter({own!r}) "
                    "first.",
                    f"适配器 {own!r} 有 layer_replication，只能单独使用：请先调用 delete_adapter({own!r})。",
                )
            )
        with replicated(self.model, name, config, others) as found:
            yield
        self.replication = found

    def adapted_layer(self, path: str) -> AdaptedLayer:
        """The layer with adapters at `path`, a new one where there is none yet."""
        if path not in self.layers:
            base_layer = self.model.get_submodule(path)
            kind = AdaptedAttention if is_multihead_attention(base_layer) else AdaptedLayer
            layer = kind(base_layer, routed=is_routed(self.model, path))
            layer.train(base_layer.training)
            self.layers[path] = layer
        return self.layers[path]

    def add_table_rows(self, name: str, path: str, rows: TableRows) -> dict[str, RowsAdapter]:
        """Gives adapter `name` rows of the table at `path`; its part on each layer that has the table, by path."""
        paths = (path, *tied_layers(self.model, path))
        found = make_table_rows({p: self.adapted_layer(p) for p in paths}, name, rows)
        for p, adapter in found.items():
            self.layers[p].add_adapter(adapter)
        return found

    def copy_modules(self, name: str, paths: Iterable[str], *, tied: bool = False) -> None:
        """Gives adapter `name` copies of modules.

        Args:
            tied: Copies of modules whose weights are one have one, too.
        """
        weights: dict[int, nn.Parameter] = {}
        for path in paths:
            module = self.model.get_submodule(path)
            if path not in self.modules_to_save:
                self.modules_to_save[path] = ModulesToSaveWrapper(module, routed=is_routed(self.model, path))
            self.modules_to_save[path].add_adapter(name, module)
            weight = module._parameters.get("weight")
            if tied and weight is not None:
                own = self.module_copy(path, name)
                own.weight = weights.setdefault(id(weight), own.get_parameter("weight"))

    def copy_parameters(self, name: str, paths: Iterable[str]) -> None:
        """Gives adapter `name` copies of parameters."""
        places = places_of(self.model)
        for path in paths:
            self._override(path, places).add_adapter(name)

    def override_parameter(self, path: str, name: str, tensor: Tensor) -> None:
        """Makes a frozen copy of `tensor` what adapter `name` has in place of the parameter at `path`."""
        override = self._override(path, places_of(self.model))
        override.adapters[name] = nn.Parameter(tensor.to(override.original), requires_grad=False)

    def _override(self, path: str, places: Callable[[nn.Parameter], Places]) -> ParameterOverride:
        if path not in self.overrides:
            original = self.model.get_parameter(path)
            self.overrides[path] = ParameterOverride(original, places(original))
        return self.overrides[path]

    def delete_adapter(self, name: str) -> None:
        """Removes all that adapter `name` has."""
        for path, layer in list(self.layers.items()):
            layer.delete_adapter(name)
            if not layer.adapters:
                del self.layers[path]
        for path, wrapper in list(self.modules_to_save.items()):
            wrapper.delete_adapter(name)
            if not wrapper.modules_to_save:
                del self.modules_to_save[path]
        for path, override in list(self.overrides.items()):
            override.delete_adapter(name)
            if not override.adapters:
                del self.overrides[path]
        if self.replication is not None and self.replication.adapter == name:
            self.replication.undo()
            self.replication = None

    # ---- what an adapter has ----

    def module_copy(self, path: str, name: str) -> nn.Module:
        """Adapter `name`'s copy of the module at `path`."""
        return self.modules_to_save[path].modules_to_save[name]

    def parameter(self, path: str, name: str) -> nn.Parameter:
        """What adapter `name` has in place of the parameter at `path`."""
        owner, _, own = path.rpartition(".")
        override = self.overrides[path]
        if name == override.active and owner in self.layers:
            return self.layers[owner].base_parameter(own)
        return override.of(name)

    def overridden_by(self, name: str) -> list[str]:
        """The paths of the parameters of which adapter `name` has its own."""
        return [path for path, override in self.overrides.items() if name in override.adapters]

    # ---- merging ----

    def check_merge(self, names: Sequence[str]) -> None:
        """
        Raises:
            MergeError: A layer cannot merge the adapters of `names`.
        """
        for layer in self.layers.values():
            layer.check_merge(names)

    def merge(self, names: Sequence[str], *, safe: bool) -> None:
        """Keeps the weights with adapters `names` merged into them, for `apply_state`.

        Raises:
            MergeError: A merged weight is not finite, with `safe`. Nothing is kept then.
        """
        self.restore_parameters()
        self._activate_overrides(names)
        found = {path: layer.merge(names, safe=safe) for path, layer in self.layers.items()}
        for path, layer in self.layers.items():
            layer.set_merged(names, found[path])

    def unmerge(self) -> None:
        """Drops the merged weights."""
        for layer in self.layers.values():
            layer.set_merged((), {})

    def merge_for_good(self, names: Sequence[str], *, safe: bool, progress: bool) -> None:
        """Leaves the base model with adapters `names` merged into it, and without anything attached.

        Raises:
            MergeError: A merged weight is not finite, with `safe`. Everything is still attached then.
        """
        self.restore_parameters()
        self._activate_overrides(names)
        found = {path: layer.merge(names, safe=True) for path, layer in self.layers.items()} if safe else {}
        trained = [(one, one.of(one.active)) for one in self.overrides.values() if one.active is not None]
        for path, layer in tqdm(self.layers.items(), disable=not progress, desc="Unloading and merging model"):
            # one layer after the other, so that no weight is there twice for long
            for key, parameter in (found[path] if safe else layer.merge(names)).items():
                setattr(layer.base_layer, key, parameter)
        for override, parameter in trained:
            override.make_permanent(parameter)
        copies: list[str] = []
        for path in self._replaced_paths():
            if inside(path, copies):
                continue
            module, wrapper = self._base_module(path), self.modules_to_save.get(path)
            name = next((n for n in names if wrapper is not None and n in wrapper.modules_to_save), None)
            if wrapper is not None and name is not None:
                copies.append(path)
                module = wrapper.in_base_dtypes(name)
            replace_module(self.model, path, module)
        for holder in (self.layers, self.modules_to_save, self.overrides):
            holder.clear()
        if self.replication is not None:
            self.replication.make_permanent()
            self.replication = None

    # ---- a larger vocabulary ----

    def resize_token_embeddings(self, *args: object, **kwargs: object) -> None:
        """Resizes the base model's embeddings, and every adapter's copy of them. The base model must be bare.

        Raises:
            ConfigError: An adapter has parameters of the old size for the embeddings or the head. Nothing has been
                changed then.
        """
        base = self.model
        both_ends = (word_embeddings(base), output_layer(base))
        paths = [path for path, module in base.named_modules() if any(module is end for end in both_ends)]
        if path := next((path for path in paths if path in self.layers), None):
            raise ConfigError(
                Bilingual(
                    f"{path} carries an adapter of the present size: resize the embeddings before attaching.",
                    f"{path} 上有当前大小的适配器：请先调整嵌入的大小，再接上适配器。",
                )
            )
        changing = [path for path in self.overrides if path.rpartition(".")[0] in paths]
        assert isinstance(base, PreTrainedModel)
        # not the injection's, which is on the model
        resize = cast(Callable[..., object], type(base).resize_token_embeddings)
        resize(base, *args, **kwargs)
        places = places_of(base)
        for path in changing:
            old = self.overrides.pop(path)
            override = self._override(path, places)
            for name, p in old.adapters.items():
                override.adapters[name] = resized(p, override.original)
        for path, wrapper in self.modules_to_save.items():
            for name, own in wrapper.modules_to_save.items():
                wrapper.modules_to_save[name] = resized_module(own, base.get_submodule(path))
