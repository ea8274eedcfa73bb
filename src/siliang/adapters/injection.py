"""Attaches adapters to a base model, freezes the rest, and can undo it all. Its method says what an adapter
consists of (`Method.attach`); attachments.py puts it into the model's modules.

Two rules keep several adapters independent. Whatever is read from the base model (where a target is, what a copy starts
from) is read while the model is bare, so that no adapter sees another. And what computes follows from the state alone
(the active, merged and disabled adapters, the rows of a batch): each function checks, changes the state, then calls
`_apply_state`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import nn
from transformers import PreTrainedModel

from siliang.adapters.active_layers import active_before, active_in
from siliang.adapters.adapted_layer import AdaptedLayer, delete_parts
from siliang.adapters.adapter import AttachedAdapter, make_shared, share_parts
from siliang.adapters.attachments import Attachments
from siliang.adapters.checks import check_not_merged, check_rows, check_together, checked_parts, warn_of_no_merge
from siliang.adapters.choose_modules import choose_saved_modules
from siliang.adapters.file_sizes import FileSizes, check_sizes
from siliang.adapters.modules_to_save import ModulesToSaveWrapper
from siliang.adapters.tied_weights import retie_or_untie
from siliang.language import Bilingual, local
from siliang.methods import method_of
from siliang.methods.adapter_names import AdapterNames
from siliang.methods.config import BASE, PeftConfig
from siliang.methods.layer import LayerAdapter
from siliang.methods.method import Parts
from siliang.types import ConfigError, MergeError

_ATTACHED: WeakSet[nn.Module] = WeakSet()  # base models that have something attached


class Injection(nn.Module):
    """A base model, and everything that has been attached to it.

    It is between PeftModel and the base model, so that parameters are called `base_model.model.<path>` as in PEFT.
    Where the first adapter is a prompt PEFT leaves that step out; then PeftModel holds the base model itself, and this
    object as an attribute.

    Attributes:
        model: The base model.
        adapters: The adapters by name.
        prompts: Those of them that are virtual tokens.
        active: The adapters that were made the active ones, even while they are disabled.
        merged: The adapters that are in the base model's own weights.
        switched_off: The model computes as the base model does, until adapters are switched on again.
    """

    prompts: nn.ModuleDict

    def __init__(self, model: nn.Module, *, for_prompts: bool = False) -> None:
        super().__init__()
        if model in _ATTACHED or any(isinstance(m, AdaptedLayer | ModulesToSaveWrapper) for m in model.modules()):
            raise ConfigError(
                Bilingual(
                    "This base model has adapters already: use the PeftModel that holds it, or unload() that one.",
                    "这个基座模型已接有适配器：请使用持有它的 PeftModel，或先 unload()。",
                )
            )
        self.model = model
        self.adapters: dict[str, AttachedAdapter] = {}
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.switched_off = False
        self.for_prompts = for_prompts
        self.attachments = Attachments(model)
        self._disabled = 0
        self._rows: AdapterNames | None = None
        self._remove_hooks: list[Callable[[], None]] = []  # of what active adapters have added to the model's forward
        self._was_trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        self.__dict__["prompts"] = nn.ModuleDict()  # not a child: PeftModel shows it, under PEFT's name for it
        _ATTACHED.add(model)
        # transformers' own would meet wrapped embeddings; __dict__, so that it is not a child
        if hasattr(model, "resize_token_embeddings"):
            model.__dict__["resize_token_embeddings"] = self.resize_token_embeddings
        for p in model.parameters():
            p.requires_grad_(False)

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # before __init__ has set it: without this line the next one would recurse without end
            if name == "model" or "_modules" not in self.__dict__:
                raise
            return getattr(self.model, name)

    # ---- the bare base model, and the present state ----

    @contextmanager
    def bare(self) -> Iterator[nn.Module]:
        """Within the block the base model is what it was: its own modules under their own paths, its own parameters."""
        self._take_hooks_off()
        self.attachments.detach()
        try:
            yield self.model
        finally:
            self.attachments.reattach()
            self._apply_state()

    def _apply_state(self) -> None:
        """Makes the model compute what the present state says. No other function decides that."""
        self._take_hooks_off()
        self.attachments.apply_state(self.active, self.merged, self._rows, disabled=self.is_disabled)
        for name in () if self.is_disabled or self._rows is not None else self.active:
            if name in self.adapters:
                adapter = self.adapters[name]
                watch = None if adapter.rows is None else adapter.rows.watch(self.model)
                remove = method_of(adapter.config).add_hooks(self.model, adapter)
                self._remove_hooks += [end for end in (watch, remove) if end is not None]

    def _take_hooks_off(self) -> None:
        while self._remove_hooks:
            self._remove_hooks.pop()()

    # ---- attaching ----

    def add_adapter(self, name: str, config: PeftConfig, *, file: FileSizes | None = None) -> None:
        """Attaches a new, inactive adapter; what the config leaves open (targets, shapes, heads) is filled in there.

        Args:
            file: It will be filled from these files. Some of several names may match nothing then, as in PEFT's.

        Raises:
            TargetError: The targets are not in the model. Nothing has been changed then.
            ConfigError: The method cannot work on this model. Nothing has been changed then.
            AdapterError: The config needs more than the files hold. Nothing has been made then.
        """
        with self.bare(), self.attachments.replicated_for(name, config, tuple(self.adapters)):
            saved = choose_saved_modules(self.model, config, lenient=file is not None)
            parts = method_of(config).attach(self.model, config, saved=saved, from_file=file is not None)
            parts = checked_parts(self.model, config, saved, parts, for_prompts=self.for_prompts)
            if file is not None:
                check_sizes(self.model, config, parts, file)
            try:
                self.adapters[name] = self._make(name, config, parts, file)
            except BaseException:
                self._delete(name)
                raise

    def _make(self, name: str, config: PeftConfig, parts: Parts, file: FileSizes | None) -> AttachedAdapter:
        prompt = None
        if parts.prompt is not None:
            has_encoder = file is not None and file.training is not None
            prompt = parts.prompt.make(self.model, from_file=file is not None, has_encoder=has_encoder)
            self.prompts[name] = prompt
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        shared = make_shared(self, parts.shared, name, device)
        layers: dict[str, LayerAdapter] = {}
        for path, make in parts.layers.items():
            layer = self.attachments.adapted_layer(path)
            layers[path] = make(layer, name, shared)
            layer.add_adapter(layers[path])
            for p in layers[path].parameters().values():
                p.requires_grad_(False)
        share_parts(layers, parts)
        for path, rows in parts.table_rows.items():
            layers |= self.attachments.add_table_rows(name, path, rows)
        for layer in layers.values():
            layer.method = config.peft_type
        self.attachments.copy_parameters(name, parts.parameters)
        self.attachments.copy_modules(name, parts.modules, tied=getattr(config, "ensure_weight_tying", False))
        return AttachedAdapter(
            name=name,
            config=config,
            parts=parts,
            layers=layers,
            shared=shared,
            prompt=prompt,
            state=dict(parts.state),
            attachments=self.attachments,
        )

    # ---- which adapters are active ----

    def set_active(self, *names: str) -> None:
        """Makes the named adapters, none or several, the ones that compute; merged ones are unmerged, as in PEFT.

        Raises:
            ConfigError: They cannot be active together. Nothing has been changed then.
        """
        check_together([self.adapters[name] for name in names])
        self.unmerge_with_warning(
            Bilingual("Other adapters are made active on", "在已合并适配器的模型上激活别的适配器")
        )
        self.active = names
        self._apply_state()

    @property
    def is_disabled(self) -> bool:
        """Whether the model computes as the base model does, whichever adapters are active."""
        return bool(self._disabled) or self.switched_off

    def switch(self, *, on: bool) -> None:
        """Lets the model compute as the base model does, or with its adapters again."""
        self.switched_off = not on
        self._apply_state()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model computes as the base model does, merged adapters or not."""
        if not self.is_disabled:
            self.active = active_before(self.attachments.layers.values(), self.active)
        self._disabled += 1
        self._apply_state()
        try:
            yield
        finally:
            self._disabled -= 1
            self._apply_state()

    @contextmanager
    def by_rows(self, names: Iterable[str], *, repeated: bool = False) -> Iterator[None]:
        """Within the block each row of a batch is computed with the adapter named for it ("__base__": with none).

        Args:
            repeated: The model may be given each row several times, one after the other, as beams are.

        Raises:
            ConfigError: Adapters are merged, or of a kind that cannot share a batch.
        """
        names = tuple(names)
        if self.is_disabled:
            yield
            return
        alone = {name for name in names if name in self.adapters and self.adapters[name].is_alone}
        check_rows(names, merged=bool(self.merged), alone=alone)
        alike = len(set(names)) == 1
        before, rows = self.active, AdapterNames(names, repeated=repeated)
        end = rows.watch(self.model)
        if alike:
            self.active = () if names[0] == BASE else names[:1]
        else:
            self._rows = rows
        try:
            self._apply_state()
            yield
        finally:
            end()
            self.active, self._rows = before, None
            self._apply_state()

    # ---- removing ----

    def delete_adapter(self, name: str) -> None:
        """Removes adapter `name`; a layer without any is the base model's own again.

        Where it was the only active one, the first of the others becomes active, as in PEFT.

        Raises:
            ConfigError: It is merged.
        """
        check_not_merged(name, self.merged)
        rest = tuple(n for n in self.active if n != name)
        others = [n for n in self.adapters if n != name]
        if name in self.active and not rest and others:
            rest = (others[0] if name in self.prompts else min(others),)
            message = Bilingual(
                f"Adapter {name} was active: {rest[0]} is the active one now.",
                f"适配器 {name} 原来是激活的：现在激活的是 {rest[0]}。",
            )
            warnings.warn(message, stacklevel=3)
        with self.bare():
            self._delete(name)
            self.active = rest

    def _delete(self, name: str) -> None:
        """Removes all that there is of an adapter, from the bare model."""
        self.adapters.pop(name, None)
        if name in self.prompts:
            del self.prompts[name]
        delete_parts(self, name)
        self.attachments.delete_adapter(name)

    def unload(self) -> nn.Module:
        """Removes everything and returns the base model as it was, bit for bit."""
        with self.bare():
            for name in list(self.adapters):
                self._delete(name)
            self.active = self.merged = ()
            self.attachments.unmerge()
        return self._release()

    def _release(self) -> nn.Module:
        for name, p in self.model.named_parameters():
            p.requires_grad_(self._was_trainable.get(name, True))
        _ATTACHED.discard(self.model)
        self.model.__dict__.pop("resize_token_embeddings", None)
        return self.model

    # ---- merging ----

    def merge(self, names: Sequence[str] | None, *, safe: bool = False) -> None:
        """Merges adapters into the base layers' weights, in addition to those that are merged already.

        Args:
            names, safe: Which, None for the active ones; refuse where a merged weight is not finite.

        Raises:
            MergeError: An adapter is of a method that does not merge, is broken, its base is quantized, or it cannot be
                active together with the others. Nothing has been changed then.
        """
        merged = self._to_merge(names)
        if merged == self.merged:
            return warn_of_no_merge()
        try:
            self.attachments.merge(merged, safe=safe)
            self.merged = merged
        finally:
            self._apply_state()

    def _to_merge(self, names: Sequence[str] | None) -> tuple[str, ...]:
        if names is None:
            names = self.active = active_in(self.attachments.layers.values(), self.active)
        for name in names:
            config = self.adapters[name].config
            if why_not := method_of(config).why_not_merged(config.to_dict()):
                raise MergeError(why_not)
        merged = (*self.merged, *(n for n in names if n not in self.merged))
        check_together([self.adapters[name] for name in merged], error=MergeError)
        self.attachments.check_merge(merged)
        return merged

    def unmerge(self) -> None:
        """Takes merged adapters out of the weights again, bit for bit."""
        self.merged = ()
        self.attachments.unmerge()
        self._apply_state()

    def unmerge_with_warning(self, what: str) -> None:
        """Unmerges if anything is merged.

        Args:
            what: What PEFT unmerges for, as the beginning of the warning.
        """
        if self.merged:
            message = Bilingual(
                f"{what} a model with merged adapters: these are unmerged first.",
                f"{local(what, 'zh')}：先取消合并。",
            )
            warnings.warn(message, stacklevel=4)
            self.unmerge()

    def merge_for_good(self, names: Sequence[str] | None, *, safe: bool = False, progress: bool = False) -> nn.Module:
        """Removes everything and returns the base model with adapters merged into it, also those merged before.

        Args:
            names: Which; None for the active ones.
            safe, progress: Refuse where a merged weight is not finite; show how far it is.

        Raises:
            MergeError: As `merge`; everything is still attached then.
        """
        merged = self._to_merge(names)
        try:
            self._take_hooks_off()
            self.attachments.merge_for_good(merged, safe=safe, progress=progress)
        except BaseException:
            self._apply_state()
            raise
        for name in list(self.adapters):
            self._delete(name)
        self.active = self.merged = ()
        self._release()
        retie_or_untie(self.model)
        return self.model

    # ---- a larger vocabulary ----

    def resize_token_embeddings(self, *args: object, **kwargs: object) -> nn.Module:
        """Resizes the embeddings, and every adapter's copy of them; returns the input embeddings.

        Raises:
            ConfigError: An adapter has parameters of the old size for the embeddings or the head. Nothing has been
                changed then.
        """
        with self.bare():
            self.attachments.resize_token_embeddings(*args, **kwargs)
        return cast(PreTrainedModel, self.model).get_input_embeddings()
