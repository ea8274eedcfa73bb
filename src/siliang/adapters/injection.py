"""Attaches adapters to a base model, freezes the rest, and can undo it all. What an adapter consists of is its method's
to say (`Method.attach`); where it stands is attachments.py's.

Two rules keep several adapters apart. Whatever is asked of the base model (where a target is, what a copy starts from)
is asked while everything is taken off it, so that no adapter sees another. And what is at work follows from the state
alone (the active, merged and disabled adapters, the rows of a batch). Each method validates, changes the state, then
calls `_settle`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from siliang.adapters.attachments import Attachments
from siliang.adapters.choose_modules import choose_saved_modules, names_of_saved
from siliang.adapters.file_sizes import FileSizes, check_sizes
from siliang.adapters.modules_to_save import SavedModule
from siliang.adapters.tied_weights import untie
from siliang.methods import method_of
from siliang.methods.config import BASE, PeftConfig
from siliang.methods.layer import AdaptedLayer, ByAdapter, SharedTensors
from siliang.methods.method import Attached, Parts
from siliang.methods.rows import Rows, watch_batches
from siliang.models.introspect import is_encoder_decoder
from siliang.models.quantized import is_quantized
from siliang.module_paths import inside, plain_modules
from siliang.types import ConfigError, MergeError, SiliangError

PROMPT_KEY = "prompt_embeddings"

_TAKEN: WeakSet[nn.Module] = WeakSet()  # base models that have something attached


class Injection(nn.Module):
    """A base model, and everything that has been attached to it.

    It stands between PeftModel and the base model, so that parameters are called `base_model.model.<path>` as in PEFT.
    Where the first adapter is a prompt PEFT leaves that step out; then PeftModel holds the base model itself, and this
    object beside it.

    Attributes:
        adapters: What each adapter consists of.
        active: The adapters that were made the active ones, even while they are disabled.
        merged: The adapters that are in the base model's own weights.
    """

    def __init__(self, model: nn.Module, *, for_prompts: bool = False) -> None:
        super().__init__()
        if model in _TAKEN or any(isinstance(m, AdaptedLayer | SavedModule) for m in model.modules()):
            raise ConfigError(
                "This base model has adapters already: go on with the PeftModel that holds it, or unload() that one."
            )
        self.model = model
        self.adapters: dict[str, Parts] = {}
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.for_prompts = for_prompts
        self._there = Attachments(model)
        self._disabled = 0
        self._rows: Rows | None = None
        self._configs: dict[str, PeftConfig] = {}
        self._states: dict[str, dict[str, Tensor]] = {}
        self._undo: list[Callable[[], None]] = []  # takes off what adapters at work have in the model's forward
        self._was_trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        # not a child: PeftModel shows it, under PEFT's name for it
        self.__dict__["prompts"] = nn.ModuleDict()
        _TAKEN.add(model)
        # transformers' own would meet wrapped embeddings; __dict__, so that it is no child
        if hasattr(model, "resize_token_embeddings"):
            model.__dict__["resize_token_embeddings"] = self.resize_token_embeddings
        for p in model.parameters():
            p.requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # not there yet: without this line the next one would ask for it for ever
            if name == "model" or "_modules" not in self.__dict__:
                raise
            return getattr(self.model, name)

    # ---- the base model alone, and with everything on it ----

    @contextmanager
    def bare(self) -> Iterator[nn.Module]:
        """Within the block the base model is what it was: its own modules under their own paths, its own parameters."""
        self._take_off_hooks()
        self._there.take_off()
        try:
            yield self.model
        finally:
            self._there.put_back()
            self._settle()

    def _settle(self) -> None:
        """Puts everything where it must stand in the present state: the one function that says what computes."""
        alone = bool(self._disabled) or self._rows is not None
        at_work, merged = ((), ()) if alone else (self.active, self.merged)
        self._take_off_hooks()
        self._there.settle(at_work, merged, self._rows)
        for name in at_work:
            if name in self.adapters:
                undo = method_of(self._configs[name]).stand(self.model, self.attached(name))
                self._undo += [undo] if undo is not None else []

    def _take_off_hooks(self) -> None:
        while self._undo:
            self._undo.pop()()

    def aside(self) -> Iterator[nn.Parameter]:
        """The parameters that are not in the model now, and must move with it all the same."""
        return self._there.aside()

    # ---- on ----

    def add_adapter(self, name: str, config: PeftConfig, *, file: FileSizes | None = None) -> None:
        """Attaches a new, inactive adapter; what the config leaves open (targets, shapes, heads) is filled in there.

        Args:
            file: It will be filled from these files. Some of several names may match nothing then, as in PEFT's.

        Raises:
            TargetError: The targets are not in the model. Nothing has been changed then.
            ConfigError: The method cannot work on this model. Nothing has been changed then.
            AdapterError: The config asks for more than is in the files. Nothing has been made then.
        """
        with self.bare():
            saved = choose_saved_modules(self.model, config, lenient=file is not None)
            parts = method_of(config).attach(self.model, config, saved=saved, from_file=file is not None)
            parts = self._checked(config, saved, parts)
            if file is not None:
                check_sizes(self.model, config, parts, file)
            try:
                self._make(name, config, parts, file)
            except BaseException:
                self._forget(name)
                raise
            self.adapters[name] = parts

    def _checked(self, config: PeftConfig, saved: Sequence[str], parts: Parts) -> Parts:
        """The parts that a method found, with the modules that are saved whole, each once; the names of these go into
        the config.

        Raises:
            ConfigError: They cannot be made on this model.
        """
        if parts.shared and self.for_prompts:
            raise ConfigError(
                f"The layers of {config.peft_type} share tensors, and the model's first adapter is a prompt: "
                "attach the prompt after it."
            )
        parts = dataclasses.replace(parts, modules=tuple(dict.fromkeys((*saved, *parts.modules))))
        if config.modules_to_save:
            paths = [path for path, _ in plain_modules(self.model)]
            config.modules_to_save = names_of_saved(config, config.modules_to_save, list(parts.modules), paths)
        for path in parts.modules:
            if any(is_quantized(m) for m in self.model.get_submodule(path).modules()):
                raise ConfigError(f"modules_to_save: {path} is quantised, and a copy of it cannot be trained.")
        # a parameter that several layers share is trained once
        once = set({id(self.model.get_parameter(path)): path for path in reversed(parts.parameters)}.values())
        return dataclasses.replace(parts, parameters=tuple(path for path in parts.parameters if path in once))

    def _make(self, name: str, config: PeftConfig, parts: Parts, file: FileSizes | None) -> None:
        self._configs[name], self._states[name] = config, {}
        if parts.prompt is not None:
            has_encoder = file is not None and file.training is not None
            self.prompts[name] = parts.prompt.make(self.model, from_file=file is not None, has_encoder=has_encoder)
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        for attribute, spec in parts.shared.items():
            self._hold_shared(attribute, name, spec.make(device), trained=spec.trained)
        shared = self._shared_by(name, parts)
        for path, spec in parts.layers.items():
            layer = self._there.layer(path)
            adapter = spec.make(layer, name, shared)
            layer.add(adapter)
            for p in adapter.parameters().values():
                p.requires_grad_(False)
        self._there.copy_parameters(name, parts.parameters)
        self._there.copy_modules(name, parts.modules)

    def _hold_shared(self, attribute: str, name: str, tensor: Tensor, *, trained: bool) -> None:
        if attribute not in self._modules:
            self.add_module(attribute, ByAdapter())
        self._shared(attribute)[name] = nn.Parameter(tensor, requires_grad=False) if trained else tensor

    def _shared_by(self, name: str, parts: Parts) -> SharedTensors:
        return SharedTensors({attribute: self._shared(attribute) for attribute in parts.shared}, name)

    def _shared(self, attribute: str) -> ByAdapter:
        return self._modules[attribute]  # type: ignore[return-value]

    # ---- at work ----

    def set_active(self, *names: str) -> None:
        """Makes the named adapters, none or several, the ones that compute; merged ones are taken out, as in PEFT.

        Raises:
            ConfigError: They cannot be at work together. Nothing has been changed then.
        """
        self._check_together(names)
        self.leave_merged("Other adapters are made active on")
        self.active = names
        self._settle()

    def leave_merged(self, what: str) -> None:
        """Takes merged adapters out of the weights, and says so: `what` does so in PEFT."""
        if self.merged:
            warnings.warn(f"{what} a model with merged adapters: these are unmerged first.", stacklevel=4)
            self.unmerge()

    def _check_together(self, names: Sequence[str], *, error: type[SiliangError] = ConfigError) -> None:
        """Refuses adapters of which one would take the place of another, or of a part of it."""
        for one, other in combinations(names, 2):
            if one == other:
                raise error(f"adapter {one!r} is named twice.")
            if one in self.prompts and other in self.prompts:
                raise error(f"Only one prompt can be at work at a time, not {one}, {other}.")
            for a, b in ((one, other), (other, one)):
                A, B = self.adapters[a], self.adapters[b]
                alone = [path for path in A.layers if self._there.layers[path].adapters[a].EXCLUSIVE]
                both = set(A.parameters) & set(B.parameters)
                clash = next((p for p in B.all if p in both or inside(p, [*A.modules, *alone])), None)
                if clash is not None:
                    raise error(
                        f"Adapters {a!r} and {b!r} cannot be at work together: each has a {clash} of its own. "
                        "Make one of them active at a time."
                    )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model computes as the base model does, merged adapters or not."""
        self._disabled += 1
        self._settle()
        try:
            yield
        finally:
            self._disabled -= 1
            self._settle()

    @contextmanager
    def by_rows(self, names: Iterable[str], *, repeated: bool = False) -> Iterator[None]:
        """Within the block each row of a batch is computed with the adapter named for it ("__base__": with none).

        Args:
            repeated: The model may be given each row several times, one after the other, as beams are.

        Raises:
            ConfigError: Adapters are merged, or are of a kind that stands in place of the base model's own parameters.
        """
        names = tuple(names)
        if self._disabled:
            yield
            return
        if self.merged:
            raise ConfigError(
                "adapter_names cannot be told apart while adapters are merged: call unmerge_adapter first."
            )
        if not names:
            raise ConfigError("adapter_names is empty: name the adapter of each row, '__base__' for none.")
        alike = len(set(names)) == 1
        if not alike and any(
            name in self.prompts or any(name in swap.adapters for swap in self._there.swaps.values()) for name in names
        ):
            raise ConfigError("adapter_names mixes adapters in layers (LoRA, IA3, LN tuning), not biases or prompts.")
        before, rows = self.active, Rows(names)
        # where the model's rows begin; an encoder that is called by itself has not been multiplied yet
        hosts = [self.model, *([self.model.get_encoder()] if is_encoder_decoder(self.model) else [])]  # type: ignore[operator]
        end = watch_batches(rows, hosts, repeated=repeated)
        if alike:
            self.active = () if names[0] == BASE else names[:1]
        else:
            self._rows = rows
        try:
            self._settle()
            yield
        finally:
            end()
            self.active, self._rows = before, None
            self._settle()

    # ---- what an adapter consists of ----

    def config_of(self, name: str) -> PeftConfig:
        """The complete config of adapter `name`."""
        return self._configs[name]

    def attached(self, name: str) -> Attached[Any]:
        """Adapter `name` as its method sees it."""
        parts = self.adapters[name]
        return Attached(
            name=name,
            config=self._configs[name],
            layers={path: self._there.layers[path].adapters[name] for path in parts.layers},
            shared=self._shared_by(name, parts),
            prompt=self.prompts[name] if name in self.prompts else None,  # noqa: SIM401, ModuleDict has no get
            state=self._states[name],
        )

    def adapter_tensors(self, name: str) -> dict[str, Tensor]:
        """What adapter `name` consists of, under the keys of the file (INTEROP: without the adapter's name).

        The keys are the same whatever else is attached. The tensors are live, but for a prompt that comes out of an
        encoder: that one is computed.
        """
        found: dict[str, Tensor] = {}
        if name in self.prompts:
            found[PROMPT_KEY] = self.prompts[name]()
        parts = self.adapters[name]
        found |= {f"base_model.{key}": self._shared(key)[name] for key, spec in parts.shared.items() if spec.saved}
        for path in parts.layers:
            own = self._there.layers[path].adapters[name].parameters()
            found |= {self._key(name, path, key): p for key, p in own.items()}
        for path in parts.modules:
            state = self._there.saved[path].modules_to_save[name].state_dict(keep_vars=True)
            found |= {self._key(name, path, key): t for key, t in state.items()}
        for path, swap in self._there.swaps.items():
            if name in swap.adapters:
                found[self.parameter_key(path, name)] = self._there.parameter(path, name)
        return found

    def parameter_key(self, path: str, name: str) -> str:
        """Under which key a file of adapter `name` holds what stands for the base model's parameter at `path`."""
        owner, _, own = path.rpartition(".")
        return self._key(name, f"{owner}.base_layer" if owner in self.adapters[name].layers else owner, own)

    def _key(self, name: str, path: str, key: str) -> str:
        prefix = "base_model" if name in self.prompts else "base_model.model"
        return f"{prefix}.{path}.{key}" if path else f"{prefix}.{key}"

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """What of adapter `name` is trained: without the buffers of saved modules, with the encoder of a prompt."""
        parts = self.adapters[name]
        found = [*self.prompts[name].parameters()] if name in self.prompts else []
        found += [self._shared(key)[name] for key, spec in parts.shared.items() if spec.trained]
        for path in parts.layers:
            found += self._there.layers[path].adapters[name].parameters().values()
        for path in parts.modules:
            found += self._there.saved[path].modules_to_save[name].parameters()
        return [*found, *(self._there.parameter(path, name) for path in parts.parameters)]

    def training_state(self, name: str) -> dict[str, Tensor]:
        """What training goes on with beside the adapter's file: the encoder of a prompt, what a method remembers."""
        prompt = self.prompts[name] if name in self.prompts else None  # noqa: SIM401, ModuleDict has no get
        return {**({} if prompt is None or prompt.flat else prompt.state_dict()), **self._states[name]}

    def set_training_state(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Makes `tensors` what the method of adapter `name` remembers."""
        self._states[name].update(tensors)

    def ask_for_gradients(self, name: str, wanted: bool) -> None:
        """Trains adapter `name`, or freezes it; what is not an adapter's is left as the user set it."""
        for p in self.adapter_parameters(name):
            p.requires_grad_(wanted and (p.is_floating_point() or p.is_complex()))

    def stand_in(self, path: str, name: str, tensor: Tensor) -> None:
        """Makes `tensor` what adapter `name` has in the place of the base model's parameter at `path`, untrained."""
        with self.bare():
            self._there.stand_in(path, name, tensor)

    # ---- off ----

    def delete_adapter(self, name: str) -> None:
        """Takes adapter `name` off; a layer without any is the base model's own again.

        Where it was the only active one, the first of the others takes its place, as in PEFT.

        Raises:
            ConfigError: It is merged.
        """
        if name in self.merged:
            raise ConfigError(
                f"adapter {name!r} is merged into the weights: call unmerge_adapter before it is deleted."
            )
        rest = tuple(n for n in self.active if n != name)
        others = [n for n in self.adapters if n != name]
        if name in self.active and not rest and others:
            rest = (others[0] if name in self.prompts else min(others),)
            warnings.warn(f"Adapter {name} was active: {rest[0]} is the active one now.", stacklevel=3)
        with self.bare():
            self._forget(name)
            self.active = rest

    def _forget(self, name: str) -> None:
        """Drops all that is there of an adapter, from the bare model."""
        for held in (self.adapters, self._configs, self._states):
            held.pop(name, None)
        if name in self.prompts:
            del self.prompts[name]
        self._forget_shared(name)
        self._there.forget(name)

    def _forget_shared(self, name: str) -> None:
        for attribute, held in list(self._modules.items()):
            if isinstance(held, ByAdapter):
                held.delete(name)
                if not len(held):
                    del self._modules[attribute]

    def merge(self, *names: str, safe: bool = False) -> None:
        """Puts adapters into the base layers' weights, beside those that are merged already.

        Args:
            safe: Refuse where a merged weight is not finite.

        Raises:
            MergeError: An adapter is of a method that does not merge, is broken, its base is quantized, or it cannot be
                at work beside the others. Nothing has been changed then.
        """
        merged = self._to_merge(names)
        try:
            self._there.merge(merged, safe=safe)
            self.merged = merged
        finally:
            self._settle()

    def _to_merge(self, names: Sequence[str]) -> tuple[str, ...]:
        for name in names:
            if why_not := method_of(self._configs[name]).why_not_mergeable:
                raise MergeError(why_not)
        merged = (*self.merged, *(n for n in names if n not in self.merged))
        self._check_together(merged, error=MergeError)
        self._there.check_merge(merged)
        return merged

    def unmerge(self) -> None:
        """Takes merged adapters out of the weights again, bit for bit."""
        self._unmerge()
        self._settle()

    def _unmerge(self) -> None:
        self.merged = ()
        self._there.unmerge()

    def unload(self) -> nn.Module:
        """Takes everything off and returns the base model as it was, bit for bit."""
        with self.bare():
            for name in list(self.adapters):
                self._forget(name)
            self.active = ()
            self._unmerge()
        return self._let_go()

    def merge_and_unload(self, *names: str, safe: bool = False, progress: bool = False) -> nn.Module:
        """Takes everything off and returns the base model with adapters in it, those that are merged already included.

        Args:
            safe: Refuse where a merged weight is not finite.
            progress: Show how far it is.

        Raises:
            MergeError: As `merge`; everything is still attached then.
        """
        merged = self._to_merge(names)
        try:
            self._take_off_hooks()
            self._there.merge_for_good(merged, safe=safe, progress=progress)
        except BaseException:
            self._settle()
            raise
        for name in list(self.adapters):
            self._forget(name)
        self.active = self.merged = ()
        self._let_go()
        untie(self.model)
        return self.model

    def _let_go(self) -> nn.Module:
        for name, p in self.model.named_parameters():
            p.requires_grad_(self._was_trainable.get(name, True))
        _TAKEN.discard(self.model)
        self.model.__dict__.pop("resize_token_embeddings", None)
        return self.model

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The base model's function of this name, and every adapter's copy of what it resizes.

        The new rows of a copy are those that the base model got. What is attached answers in the base model's place.

        Returns:
            The input embeddings.

        Raises:
            ConfigError: An adapter has parameters of the old size beside the embeddings or the head. Nothing has been
                changed then.
        """
        with self.bare():
            self._there.resize_token_embeddings(*args, **kwargs)
        return self.model.get_input_embeddings()  # type: ignore[operator]
