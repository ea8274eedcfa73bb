"""What stands in a base model's modules: layers with adapters, copies of whole modules, parameters in the place of its
own. It knows nothing of what adapters are called together or may do: that is inject.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from siliang.adapters.modules_to_save import SavedModule, resized_module
from siliang.adapters.parameter_override import Swap, resized, sites_of
from siliang.adapters.tied_weights import replace
from siliang.methods.layer import AdaptedLayer
from siliang.methods.rows import Rows
from siliang.module_paths import inside
from siliang.types import ConfigError


class Attachments:
    """Everything that has been put into one base model.

    Attributes:
        model: The base model.
        layers: Its layers with adapters on them, by path.
        saved: Its modules of which adapters have copies of their own.
        swaps: Its parameters of which adapters have their own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, AdaptedLayer] = {}
        self.saved: dict[str, SavedModule] = {}
        self.swaps: dict[str, Swap] = {}

    # ---- the base model alone, and with everything in it ----

    def take_off(self) -> None:
        """Makes the base model what it was: its own modules under their own paths, its own parameters."""
        self.lay_down()
        for path in self._places():
            replace(self.model, path, self._own(path))

    def put_back(self) -> None:
        """Puts everything where it stood, and what has been added since where it belongs."""
        for path in reversed(self._places()):
            own = self.model.get_submodule(path)
            standing = self.layers.get(path, own)
            if path in self.saved:
                self.saved[path].original_module = standing
                standing = self.saved[path]
            replace(self.model, path, standing)

    def lay_down(self) -> None:
        """Gives the base model's modules their own parameters."""
        for layer in self.layers.values():
            layer.lay_down()
        self._put_swaps(())

    def settle(self, at_work: tuple[str, ...], merged: tuple[str, ...], rows: Rows | None) -> None:
        """Lets these adapters compute, and no others.

        Args:
            at_work: The active ones.
            merged: Those that are in the weights.
            rows: For a batch that mixes adapters, the one of each row; then there are none at work or merged.
        """
        for layer in self.layers.values():
            layer.lay_down()
        self._put_swaps((*merged, *at_work))
        for layer in self.layers.values():
            layer.stand(at_work, merged=bool(merged))
            layer.rows = rows
        for saved in self.saved.values():
            saved.active = next((n for n in at_work if n in saved.modules_to_save), None)
            saved.rows = rows

    def _put_swaps(self, names: Sequence[str]) -> None:
        for swap in self.swaps.values():
            swap.put(next((n for n in names if n in swap.adapters), None))

    def _places(self) -> list[str]:
        """Where something stands in a module's place, the outer ones first."""
        return sorted({*self.layers, *self.saved}, key=lambda path: (path.count("."), path))

    def _own(self, path: str) -> nn.Module:
        return self.layers[path].base_layer if path in self.layers else self.saved[path].original_module

    def aside(self) -> Iterator[nn.Parameter]:
        """The parameters that are not in the model now, and must move with it all the same."""
        for holder in (*self.layers.values(), *self.swaps.values()):
            yield from holder.aside()

    # ---- on, and off ----

    def layer(self, path: str) -> AdaptedLayer:
        """The layer with adapters at `path`, a new one where there is none yet."""
        if path not in self.layers:
            own = self.model.get_submodule(path)
            layer = AdaptedLayer(own)
            layer.train(own.training)
            self.layers[path] = layer
        return self.layers[path]

    def copy_modules(self, name: str, paths: Iterable[str]) -> None:
        """Gives adapter `name` copies of modules."""
        for path in paths:
            own = self.model.get_submodule(path)
            if path not in self.saved:
                self.saved[path] = SavedModule(own)
            self.saved[path].add_adapter(name, own)

    def copy_parameters(self, name: str, paths: Iterable[str]) -> None:
        """Gives adapter `name` copies of parameters."""
        sites = sites_of(self.model)
        for path in paths:
            self._swap(path, sites).add_adapter(name)

    def stand_in(self, path: str, name: str, tensor: Tensor) -> None:
        """Makes `tensor` what adapter `name` has in the place of the one at `path`."""
        swap = self._swap(path, sites_of(self.model))
        swap.adapters[name] = nn.Parameter(tensor.to(swap.original), requires_grad=False)

    def _swap(self, path: str, sites: Any) -> Swap:
        if path not in self.swaps:
            original = self.model.get_parameter(path)
            self.swaps[path] = Swap(original, sites(original))
        return self.swaps[path]

    def parameter(self, path: str, name: str) -> nn.Parameter:
        """What adapter `name` has in the place of the parameter at `path`."""
        owner, _, own = path.rpartition(".")
        swap = self.swaps[path]
        if name == swap.standing and owner in self.layers:
            return self.layers[owner].own_parameter(own)
        return swap.of(name)

    def forget(self, name: str) -> None:
        """Drops all that adapter `name` has. The base model must be alone."""
        for path, layer in list(self.layers.items()):
            layer.delete(name)
            if not layer.adapters:
                del self.layers[path]
        for path, saved in list(self.saved.items()):
            saved.delete_adapter(name)
            if not saved.modules_to_save:
                del self.saved[path]
        for path, swap in list(self.swaps.items()):
            swap.delete_adapter(name)
            if not swap.adapters:
                del self.swaps[path]

    # ---- merging ----

    def check_merge(self, names: Sequence[str]) -> None:
        """
        Raises:
            MergeError: A layer cannot take the adapters of `names` into its weights.
        """
        for layer in self.layers.values():
            layer.check_merge(names)

    def merge(self, names: Sequence[str], *, safe: bool) -> None:
        """Keeps the weights with adapters `names` in them, for `settle` to put where the model reads them.

        Raises:
            MergeError: A merged weight is not finite, with `safe`. Nothing is kept then.
        """
        self.lay_down()
        self._put_swaps(names)
        found = {path: layer.merge(names, safe=safe) for path, layer in self.layers.items()}
        for path, layer in self.layers.items():
            layer.hold_merged(names, found[path])

    def unmerge(self) -> None:
        """Forgets the merged weights."""
        for layer in self.layers.values():
            layer.hold_merged((), {})

    def merge_for_good(self, names: Sequence[str], *, safe: bool, progress: bool) -> None:
        """Leaves the base model with adapters `names` in it, and without anything attached.

        Raises:
            MergeError: A merged weight is not finite, with `safe`. Everything is still attached then.
        """
        self.lay_down()
        self._put_swaps(names)
        found = {path: layer.merge(names, safe=True) for path, layer in self.layers.items()} if safe else {}
        trained = [(swap, swap.of(swap.standing)) for swap in self.swaps.values() if swap.standing is not None]
        for path, layer in _shown(self.layers.items(), progress):
            # one layer after the other, so that no weight is there twice for long
            for key, parameter in (found[path] if safe else layer.merge(names)).items():
                setattr(layer.base_layer, key, parameter)
        for swap, parameter in trained:
            swap.stay(parameter)
        copies: list[str] = []
        for path in self._places():
            if inside(path, copies):
                continue
            standing, saved = self._own(path), self.saved.get(path)
            name = next((n for n in names if saved is not None and n in saved.modules_to_save), None)
            if saved is not None and name is not None:
                copies.append(path)
                standing = saved.in_own_format(name)
            replace(self.model, path, standing)
        for holder in (self.layers, self.saved, self.swaps):
            holder.clear()

    # ---- a larger vocabulary ----

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> None:
        """Resizes the base model's embeddings, and every adapter's copy of them. The base model must be alone.

        Raises:
            ConfigError: An adapter has parameters of the old size beside the embeddings or the head. Nothing has been
                changed then.
        """
        base: Any = self.model
        both_ends = [end() for end in (base.get_input_embeddings, base.get_output_embeddings)]
        paths = [path for path, module in base.named_modules() if any(module is end for end in both_ends)]
        if path := next((path for path in paths if path in self.layers), None):
            raise ConfigError(f"{path} carries an adapter of the present size: resize the embeddings before attaching.")
        changing = [path for path in self.swaps if path.rpartition(".")[0] in paths]
        type(base).resize_token_embeddings(base, *args, **kwargs)
        sites = sites_of(base)
        for path in changing:
            old = self.swaps.pop(path)
            swap = self._swap(path, sites)
            for name, p in old.adapters.items():
                swap.adapters[name] = resized(p, swap.original)
        for path, saved in self.saved.items():
            for name, twin in saved.modules_to_save.items():
                saved.modules_to_save[name] = resized_module(twin, base.get_submodule(path))


def _shown(layers: Any, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(layers, disable=not progress, desc="Unloading and merging model")
