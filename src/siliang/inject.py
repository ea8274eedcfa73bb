"""Attaches adapters to a base model, freezes the rest, and can undo it all: the only file that changes a base model's
modules. Where is targets.py's to say, what is methods/'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from siliang.methods import BitFitConfig, HeadConfig, PromptTuningConfig, PromptTuningInit, method_of
from siliang.methods.base import LayerConfig, PeftConfig, Prompt, PromptConfig, WrappedLayer
from siliang.methods.bitfit import bias_names
from siliang.saved_module import SavedModule, Swap
from siliang.targets import find_saved_modules, find_targets, inside, layer_arguments, lora_biases, no_biases
from siliang.types import ConfigError, MergeError, TargetError, TaskType
from siliang.virtual_tokens import Route, word_embeddings

# The heads that are new, and so trained and saved by themselves, for each task.
TASK_HEADS: dict[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
OTHER_HEADS = ("classification_head",)  # BART's and T5's, which PEFT leaves untrained
PROMPT_KEY = "prompt_embeddings"


class Injection(nn.Module):
    """A base model, and everything that has been attached to it.

    It stands between PeftModel and the base model, so that parameters are called `base_model.model.<path>` as in PEFT.
    With prompts PEFT leaves that step out; then PeftModel holds the base model itself, and this object beside it.
    """

    def __init__(self, model: nn.Module, *, for_prompts: bool = False) -> None:
        super().__init__()
        self.model = model
        self.active: tuple[str, ...] = ()
        self.for_prompts = for_prompts
        self.key_prefix = "base_model." if for_prompts else "base_model.model."
        self._prompt_configs: dict[str, PromptConfig] = {}
        self._route: Route | None = None
        self._swaps: dict[str, Swap] = {}
        self._was_trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        # not a child: PeftModel shows it, under PEFT's name for it
        self.__dict__["prompts"] = nn.ModuleDict()
        for p in model.parameters():
            p.requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet: without this line the next one would ask for it for ever
                raise
            return getattr(self.model, name)

    # ---- on ----

    def add_adapter(self, name: str, config: PeftConfig, *, lenient: bool = False) -> None:
        """Attaches a new, inactive adapter; what the config leaves open (targets, shapes, heads) is filled in there.

        Args:
            lenient: Some of several names may match nothing, as in files that PEFT wrote.

        Raises:
            TargetError: The targets are not in the model. Nothing has been changed then.
            ConfigError: The method cannot work on this model.
        """
        if isinstance(config, PromptConfig) is not self.for_prompts:
            raise ConfigError("Adapters in layers and prompts cannot stand on one model: unload() it first.")
        saved = self._saved_modules(config, lenient=lenient)
        layers: list[str] = []
        biases: list[str] = []
        if isinstance(config, PromptConfig):
            self._add_prompt(name, config, from_file=lenient)
        elif isinstance(config, HeadConfig):
            if not saved:
                raise TargetError("Training the head alone needs a head: task SEQ_CLS, TOKEN_CLS or QUESTION_ANS.")
        elif isinstance(config, BitFitConfig):
            biases = [b for b in bias_names(self.model) if not inside(b, saved)]
            if not biases:
                raise TargetError(no_biases(self.model))
        elif isinstance(config, LayerConfig):
            layers = find_targets(self.model, config, outside=saved, lenient=lenient)
            biases = lora_biases(self.model, config, layers, saved)
        arguments = layer_arguments(cast(LayerConfig, config), layers, lenient=lenient)
        for path in layers:
            self._wrap(path, cast(LayerConfig, config)).add_adapter(name, **arguments[path])
        for path in biases:
            self._swap(path).adapters[name] = nn.Parameter(
                self._swap(path).original.detach().clone(), requires_grad=False
            )
        for path in saved:
            module = self.model.get_submodule(path)
            if not isinstance(module, SavedModule):
                module = SavedModule(module)
                replace(self.model, path, module)
            module.add_adapter(name)

    def _saved_modules(self, config: PeftConfig, *, lenient: bool) -> list[str]:
        heads = TASK_HEADS.get(config.task_type, ()) if config.task_type else ()
        wanted = list(config.modules_to_save or ())
        if lenient and wanted:
            heads = ()  # the file says what it holds
        if config.task_type is TaskType.SEQ_CLS and heads:
            heads = (*heads, *(name for name in OTHER_HEADS if find_saved_modules(self.model, [name], required=[])))
        if heads:
            config.modules_to_save = sorted({*wanted, *heads})
        return find_saved_modules(self.model, [*wanted, *heads], required=[] if lenient else wanted)

    def _wrap(self, path: str, config: LayerConfig) -> WrappedLayer:
        layer = self.model.get_submodule(path)
        if isinstance(layer, WrappedLayer):
            if not isinstance(layer, method_of(config).layers):
                raise ConfigError(
                    f"{path} carries an adapter of another method already; adapters on one model must be of one method."
                )
            return layer
        layer_class = next(kind for kind in method_of(config).layers if kind.supports(layer))
        wrapped = layer_class(layer)
        wrapped.train(layer.training)
        replace(self.model, path, wrapped)
        return wrapped

    def _swap(self, path: str) -> Swap:
        return self._swaps.setdefault(path, Swap.of(self.model, path))

    def _add_prompt(self, name: str, config: PromptConfig, *, from_file: bool) -> None:
        embeddings = word_embeddings(self.model)
        config.complete(self.model.config)
        start = config
        if from_file and isinstance(config, PromptTuningConfig):  # the file holds the prompt: no tokenizer is fetched
            start = dataclasses.replace(config, prompt_tuning_init=PromptTuningInit.RANDOM, tokenizer_kwargs=None)
        # made where the model is: on the meta device the encoder of a large model costs nothing
        weight = next(self.model.parameters())
        with torch.device(weight.device):
            prompt = method_of(config).make_prompt(start, embeddings)
        Route.of(self.model, config, prompt).remove()  # to find out now whether the model has a place for it
        prompt.requires_grad_(False)
        self.prompts[name] = prompt
        self._prompt_configs[name] = config

    # ---- at work ----

    def set_active(self, *names: str) -> None:
        """Makes the named adapters, none or several, the ones that compute."""
        self.active = names
        for module in self.model.modules():
            if isinstance(module, WrappedLayer):
                module.activate(names)
            elif isinstance(module, SavedModule):
                module.active = next((n for n in names if n in module.modules_to_save), None)
        for swap in self._swaps.values():
            swap.put(next((n for n in names if n in swap.adapters), None))
        if self._route is not None:
            self._route.remove()
            self._route = None
        for name in names:
            if name in self.prompts:
                if len(names) > 1:
                    raise ConfigError(f"Only one prompt can be at work at a time, not {', '.join(names)}.")
                self._route = Route.of(self.model, self._prompt_configs[name], cast(Prompt, self.prompts[name]))

    def train_only(self, *names: str) -> None:
        """Sets requires_grad on the parameters of the named adapters and on nothing else."""
        for p in (*self.parameters(), *self.prompts.parameters()):
            p.requires_grad_(False)
        for name in names:
            for p in self.adapter_parameters(name):
                p.requires_grad_(True)

    @contextmanager
    def by_rows(self, names: Iterable[str]) -> Iterator[None]:
        """Within the block each row of a batch is computed with the adapter named for it ("__base__": with none).

        Raises:
            ConfigError: The adapters are of a kind that stands in place of the base model's own parameters.
        """
        rows = tuple(names)
        if self.for_prompts or any(name in swap.adapters for swap in self._swaps.values() for name in rows):
            raise ConfigError("adapter_names mixes adapters in layers (LoRA, IA3, LN tuning), not biases or prompts.")
        modules = [m for m in self.model.modules() if isinstance(m, WrappedLayer | SavedModule)]
        for module in modules:
            module.row_adapters = rows
        try:
            yield
        finally:
            for module in modules:
                module.row_adapters = None

    # ---- what an adapter consists of ----

    def adapter_tensors(self, name: str) -> dict[str, Tensor]:
        """What adapter `name` consists of, under the keys of the file (INTEROP: without the adapter's name).

        The tensors are live, but for a prompt that comes out of an encoder: that one is computed.
        """
        found: dict[str, Tensor] = {}
        if name in self.prompts:
            found[PROMPT_KEY] = self.prompts[name]()
        wrapped = set()
        for path, module in self.model.named_modules():
            if isinstance(module, WrappedLayer):
                wrapped.add(path)
                found |= {self._key(path, key): p for key, p in module.adapter_parameters(name).items()}
            elif isinstance(module, SavedModule) and name in module.modules_to_save:
                state = module.modules_to_save[name].state_dict(keep_vars=True)
                found |= {self._key(path, key): t for key, t in state.items()}
        for path, swap in self._swaps.items():
            if name in swap.adapters:
                owner, _, own = path.rpartition(".")
                found[self._key(f"{owner}.base_layer" if owner in wrapped else owner, own)] = swap.adapters[name]
        return found

    def _key(self, path: str, key: str) -> str:
        return f"{self.key_prefix}{path}.{key}" if path else f"{self.key_prefix}{key}"

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """What of adapter `name` is trained: without the buffers of saved modules, with the encoder of a prompt."""
        found = [t for t in self.adapter_tensors(name).values() if isinstance(t, nn.Parameter)]
        made_by = list(self.prompts[name].parameters()) if name in self.prompts else []
        return [*made_by, *(p for p in found if not any(p is q for q in made_by))]

    def stand_in(self, path: str, name: str, tensor: Tensor) -> None:
        """Makes `tensor` what adapter `name` has in the place of the base model's parameter at `path`."""
        self._swap(path).adapters[name] = nn.Parameter(tensor, requires_grad=False)

    # ---- off ----

    def delete_adapter(self, name: str) -> None:
        """Takes adapter `name` off; a layer without any is the base model's own again."""
        self.set_active(*(n for n in self.active if n != name))
        if name in self.prompts:
            del self.prompts[name], self._prompt_configs[name]
        for path, module in list(self.model.named_modules()):
            if isinstance(module, WrappedLayer):
                module.delete_adapter(name)
                if not any(getattr(module, attribute) for attribute in module.ADAPTER_ATTRIBUTES):
                    replace(self.model, path, module.restore())
            elif isinstance(module, SavedModule):
                module.delete_adapter(name)
                if not module.modules_to_save:
                    replace(self.model, path, module.original_module)
        for path, swap in list(self._swaps.items()):
            swap.adapters.pop(name, None)
            if not swap.adapters:
                del self._swaps[path]

    @property
    def merged(self) -> tuple[str, ...]:
        """The adapters that are in the base model's own weights just now."""
        found = (n for m in self.model.modules() if isinstance(m, WrappedLayer) for n in m.merged)
        return tuple(dict.fromkeys(found))

    def merge(self, *names: str, safe: bool = False, keep: bool = True) -> None:
        """Puts adapters into the base layers' weights.

        Args:
            safe: Refuse where a merged weight is not finite; nothing has been changed then.
            keep: Hold the originals for `unmerge`.

        Raises:
            MergeError: The adapter is a prompt, is broken, or its base is quantised.
        """
        if self.for_prompts:
            raise MergeError("A prompt stands beside the weights and cannot be merged into them: keep the adapter.")
        done: list[WrappedLayer] = []
        try:
            for module in self.model.modules():
                if isinstance(module, WrappedLayer):
                    done.append(module)
                    for name in names:
                        module.merge(name, safe=safe, keep=keep or safe)
        except BaseException:
            for module in done:
                module.unmerge()
            raise

    def unmerge(self) -> None:
        """Takes merged adapters out of the weights again, bit for bit."""
        for module in self.model.modules():
            if isinstance(module, WrappedLayer):
                module.unmerge()
                module.activate(self.active)

    def unload(self, *merge: str, safe: bool = False) -> nn.Module:
        """Takes everything off again and returns the base model: as it was, bit for bit, or with adapters merged.

        Raises:
            MergeError: See `merge`; everything is still attached then.
        """
        self.unmerge()
        self.set_active(*merge)
        if merge:
            self.merge(*merge, safe=safe, keep=False)
        for path, module in list(self.model.named_modules()):
            if isinstance(module, WrappedLayer):
                replace(self.model, path, module.base_layer if merge else module.restore())
            elif isinstance(module, SavedModule):
                replace(self.model, path, module.current)
        for name, p in self.model.named_parameters():
            p.requires_grad_(self._was_trainable.get(name, True))
        self._swaps.clear()
        self.prompts.clear()
        if merge:
            _untie(self.model)
        return self.model


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _untie(model: Any) -> None:
    """Says in the config that input and output embeddings are tied no more, where merging into one of them parted them.

    Otherwise saving would drop one of the two, and loading tie the other to it.
    """
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if None not in ends and ends[0].weight is not ends[1].weight:
        config.tie_word_embeddings = False
