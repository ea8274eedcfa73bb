"""get_peft_model and PeftModel: a base model with adapters, under the names of Hugging Face PEFT. Thin: the work is in
adapters/ and merge.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from siliang.adapters.adapter_state import adapter_state
from siliang.adapters.file_sizes import FileSizes
from siliang.adapters.files import (
    adapter_folder,
    at_most_what_is_there,
    load_tensors,
    read_adapter,
    read_training,
    save_adapter,
)
from siliang.adapters.injection import Injection
from siliang.answers_as_base import AnswersAsBase
from siliang.methods import METHODS
from siliang.methods.config import BASE, CONFIG_NAME, PeftConfig
from siliang.methods.lora_conversion import as_plain_lora
from siliang.models.quantized import count_parameters, keep_as_stored
from siliang.peft_checks import refresh
from siliang.types import ConfigError, nearest


def get_peft_model(model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default") -> PeftModel:
    """Attaches a new adapter to `model`, freezes the rest, and makes the adapter the one that is trained.

    The model itself is changed; `PeftModel.unload()` gives it back.

    Args:
        peft_config: The method and its settings; copied, then completed (target modules, heads, base model's name).

    Raises:
        TargetError: The method's targets are not in the model. The model has not been changed then.
    """
    return PeftModel(model, peft_config, adapter_name)


class PeftModel(AnswersAsBase):
    """A base model with named adapters, one of which is active.

    Attributes:
        injection: All that is attached. With adapters in layers it is `base_model`; with prompts that is the base model
            itself, and `prompt_encoder` holds the prompts, as in PEFT.
    """

    injection: Injection

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        *,
        file: FileSizes | None = None,
    ) -> None:
        refresh()
        nn.Module.__init__(self)  # PreTrainedModel's own would adjust the base model's config to this wrapper
        if isinstance(model, PeftModel):
            raise ConfigError("The model has adapters already: call its add_adapter, or unload() it first.")
        if any(type(m).__module__.partition(".")[0] == "peft" for m in model.modules()):
            raise ConfigError("The model has adapters of peft on it: take them off first, with its unload().")
        if not isinstance(peft_config, PeftConfig):
            name, module = type(peft_config).__name__, type(peft_config).__module__.partition(".")[0]
            if module == "peft":
                known = any(m.config is not None and m.config.__name__ == name for m in METHODS.values())
                way = (
                    f"import siliang's: from siliang import {name}." if known else "siliang does not have that method."
                )
                raise ConfigError(f"This {name} is peft's class: {way}")
            raise ConfigError(f"{name} is not a method's config of siliang, such as LoraConfig.")
        self.peft_config: dict[str, PeftConfig] = {}  # type: ignore[assignment]
        keep_as_stored(model)
        injection = Injection(model, for_prompts=peft_config.is_prompt_learning)
        self.__dict__["injection"] = injection
        self._modules["base_model"] = model if injection.for_prompts else injection
        try:
            self._add_adapter(adapter_name, peft_config, file=file)
            self.set_adapter(adapter_name)
        except BaseException:
            self.unload()
            raise

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PeftModel:
        """Moves the parameters that are not in the model now along with it."""
        super()._apply(fn, recurse)
        for p in {id(p): p for p in self.injection.parked_parameters()}.values():
            p.data = fn(p.data)
        return self

    # ---- adapters ----

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig) -> None:  # type: ignore[override]
        """Attaches another new adapter, inactive and frozen until `set_adapter`.

        Merged adapters are taken out of the weights, as in PEFT.

        Raises:
            ConfigError: The name is taken, or the method cannot work on this model. It is unchanged then.
        """
        self._add_adapter(adapter_name, peft_config)

    def _add_adapter(
        self,
        name: str,
        peft_config: PeftConfig,
        *,
        file: FileSizes | None = None,
        fill: Callable[[], None] = lambda: None,
    ) -> None:
        """Attaches an adapter and lets `fill` load it; where that fails the adapter is taken off again."""
        if not name or any(c in name for c in "./\\") or name == BASE:
            raise ConfigError(f"adapter name {name!r}: use letters, digits, '-' and '_', at least one.")
        if name in self.peft_config:
            raise ConfigError(f"adapter {name!r} is there already: {', '.join(self.peft_config)}.")
        config = copy.deepcopy(peft_config)
        config.__post_init__()  # fields may have been set since it was made
        base = self.get_base_model()
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
        if config.task_type is None:
            config.auto_mapping = {
                "base_model_class": type(base).__name__,
                "parent_library": type(base).__module__,
            }
        self.injection.add_adapter(name, config, file=file)
        if name in self.injection.prompts:
            self._modules["prompt_encoder"] = self.injection.prompts
        try:
            fill()
            self.injection.unmerge_with_warning("An adapter is added to")
        except BaseException:
            self.injection.delete_adapter(name)
            raise
        self.peft_config[name] = config

    def load_adapter(  # type: ignore[override]
        self, model_id: str | Path, adapter_name: str, is_trainable: bool = False
    ) -> None:
        """Attaches an adapter from a folder (or a hub name), inactive until `set_adapter`.

        Where the model has an adapter of this name already, the file's weights are copied into that one, as in PEFT;
        merged adapters are taken out of the weights first. It stays active or not, and trained or frozen, as it was.

        Args:
            is_trainable: Train it, with its head, from now on; otherwise a new one stays frozen.

        Raises:
            AdapterError: The files are damaged, incomplete, or do not fit the model, which is unchanged then.
            ConfigError: The model's adapter of this name has other settings than the file.
        """
        folder = adapter_folder(model_id)
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = not is_trainable
        tensors, training = read_adapter(folder), read_training(folder)
        if adapter_name in self.peft_config:
            self.peft_config[adapter_name].check_same(config, source=f"{folder}/{CONFIG_NAME}", name=adapter_name)
            self.injection.unmerge_with_warning("Other weights are loaded into")
            trained = any(p.requires_grad for p in self.injection.adapters[adapter_name].parameters())
            with at_most_what_is_there(folder):
                load_tensors(self.injection, adapter_name, tensors, source=str(folder), training=training)
            self.injection.adapters[adapter_name].set_trainable(trained or is_trainable)
            return

        def fill() -> None:
            load_tensors(self.injection, adapter_name, tensors, source=str(folder), training=training)

        with at_most_what_is_there(folder):
            self._add_adapter(adapter_name, config, file=FileSizes.of(folder, tensors, training), fill=fill)
        self.injection.adapters[adapter_name].set_trainable(is_trainable)

    def delete_adapter(self, adapter_name: str) -> None:  # type: ignore[override]
        """Takes an adapter off for good. Where it was the only active one, another takes its place, as in PEFT.

        Raises:
            ConfigError: It is not there, or is merged into the weights.
        """
        self._known(adapter_name)
        before = self.injection.active
        self.injection.delete_adapter(adapter_name)
        del self.peft_config[adapter_name]
        if self.injection.active != before:
            self._train_active()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:  # type: ignore[override]
        """Makes one adapter (or several, which add up) the active one, and trained unless loaded for inference.

        Merged adapters are taken out of the weights first, as in PEFT.

        Args:
            inference_mode: Leave it frozen.

        Raises:
            ConfigError: One is not there, or they cannot be at work together. The model is unchanged then.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self._known(name)
        self.injection.set_active(*names)
        self._train_active(frozen=inference_mode)

    def _train_active(self, *, frozen: bool = False) -> None:
        for name, config in self.peft_config.items():
            trained = name in self.injection.active and not config.inference_mode and not frozen
            self.injection.adapters[name].set_trainable(trained)

    @property
    def active_adapter(self) -> str | None:
        """The active adapter, the first of several, even while it is disabled; None where there is none."""
        return next(iter(self.injection.active), None)

    @property
    def active_adapters(self) -> list[str]:  # type: ignore[override]
        return list(self.injection.active)

    @property
    def active_peft_config(self) -> PeftConfig:
        if self.active_adapter is None:
            raise ConfigError("No adapter is active: make one so with set_adapter.")
        return self.peft_config[self.active_adapter]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model computes as the base model does, merged adapters or not."""
        with self.injection.disabled():
            yield

    def _known(self, name: str) -> None:
        if name not in self.peft_config:
            raise ConfigError(
                f"adapter {name!r} is not there; there are {', '.join(self.peft_config) or 'none'}."
                + nearest(name, self.peft_config)
            )

    # ---- merging, and off again ----

    def get_base_model(self) -> nn.Module:
        """The base model, with what is attached still in it."""
        return self.injection.model

    def unload(self) -> nn.Module:
        """Takes the adapters off and returns the base model as it was, bit for bit, even if some had been merged."""
        base = self.injection.unload()
        self.peft_config.clear()
        return base

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | str | None = None
    ) -> nn.Module:
        """Adds adapters (the active ones) into the weights and returns the plain base model, in its own number format.

        Those that are merged already stay in. With the named adapters come their heads and biases; PEFT takes the
        active one's. See `siliang.merge` for a merge that is proved.

        Args:
            progressbar: Show how far it is.
            safe_merge: Refuse where merged weights would not be finite; the model is unchanged then.

        Raises:
            MergeError: The base model is quantised, the adapter is a prompt, or, with `safe_merge`, broken.
        """
        names = self._chosen(adapter_names)
        base = self.injection.merge_and_unload(*names, safe=safe_merge, progress=progressbar)
        self.peft_config.clear()
        return base

    def merge_adapter(self, adapter_names: list[str] | str | None = None, safe_merge: bool = False) -> None:
        """Adds adapters (the active ones) into the weights in place, until `unmerge_adapter`, which is exact.

        A layer with merged adapters computes with these alone, as in PEFT, whichever is active; heads are the active
        one's. Until then the original weights of the tuned layers are held as well.

        Raises:
            MergeError: As for `merge_and_unload`; nothing is merged then.
        """
        self.injection.merge(*self._chosen(adapter_names), safe=safe_merge)

    def unmerge_adapter(self) -> None:
        """Takes merged adapters out of the weights again, bit for bit."""
        self.injection.unmerge()

    def _chosen(self, names: list[str] | str | None) -> list[str]:
        chosen = self.active_adapters if names is None else [names] if isinstance(names, str) else names
        for name in chosen:
            self._known(name)
        return chosen

    # ---- files ----

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        *,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Writes the adapters: "default" into the folder itself, others into folders of their names inside it.

        Args:
            safe_serialization: As safetensors; otherwise as a pickled adapter_model.bin.
            selected_adapters: Which; None for all.
            save_embedding_layers: See `get_peft_model_state_dict`.
            is_main_process: Only the main process writes.
            path_initial_model_for_weight_conversion: The folder of the same adapter as it was before training, for one
                that started with "pissa" or "olora": what is written is plain LoRA of twice the rank, on the base.
            state_dict: See `get_peft_model_state_dict`.

        Raises:
            ConfigError: An adapter is not there, or cannot be turned into plain LoRA. Nothing has been written then.
        """
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        for name in names:
            self._known(name)
        if Path(save_directory).is_file():
            raise ConfigError(f"{save_directory} is a file, and adapters are saved into a folder.")
        initial = path_initial_model_for_weight_conversion
        written = []
        for name in names:
            config, tensors = self.peft_config[name], self.adapter_state(name, state_dict, save_embedding_layers)
            if initial is not None:
                start = partial(read_adapter, Path(initial))
                config, tensors = as_plain_lora(config, tensors, start, str(initial))
            written.append((name, config, tensors))
        if not is_main_process:
            return
        for name, config, tensors in written:
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            save_adapter(folder, self.injection.adapters[name], config, tensors, pickled=not safe_serialization)

    def adapter_state(
        self,
        name: str,
        state_dict: dict[str, Tensor] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
    ) -> dict[str, Tensor]:
        """See `get_peft_model_state_dict`. The tensors are live where they can be."""
        self._known(name)
        keys = None
        if state_dict is not None:
            named = [*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)]
            keys = {id(t): key for key, t in named}
        return adapter_state(self.injection, name, state_dict=state_dict, keys=keys, embeddings=save_embedding_layers)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
    ) -> PeftModel:
        """Attaches a saved adapter to its base model.

        Args:
            model_id: The adapter's folder, or its name on the hub.
            is_trainable: Go on training it; otherwise it is frozen and the model put into eval mode. P-tuning and a
                projected prefix go on where siliang saved them; from PEFT's files, which lack what made the prompt, the
                prompt itself is trained.
            config: Used in the file's place.

        Raises:
            AdapterError: The files are damaged, incomplete, or do not fit the model, which is unchanged then.
        """
        folder = adapter_folder(model_id)
        config = copy.deepcopy(config) or PeftConfig.from_pretrained(folder)
        config.inference_mode = not is_trainable
        tensors, training = read_adapter(folder), read_training(folder) if is_trainable else None
        with at_most_what_is_there(folder):
            peft_model = cls(model, config, adapter_name, file=FileSizes.of(folder, tensors, training))
            try:
                load_tensors(peft_model.injection, adapter_name, tensors, source=str(folder), training=training)
            except BaseException:
                peft_model.unload()
                raise
        peft_model.set_adapter(adapter_name)
        if not is_trainable:
            peft_model.eval()
        return peft_model

    # ---- counting ----

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trained parameters, all parameters of the model that is there)."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Prints the counts in PEFT's form."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    # ---- computing ----

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward. The names are spelt out because the stock Trainer reads them off here.

        Args:
            adapter_names: The adapter of each row of the batch, "__base__" for none; None: the active one for all.
        """
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "labels": labels,
            "start_positions": start_positions,
            "end_positions": end_positions,
        }
        given = {name: value for name, value in named.items() if value is not None}
        with self._rows(adapter_names):
            if given.keys() <= {"input_ids"} and not isinstance(self.get_base_model(), PreTrainedModel):
                return self.base_model(*given.values(), **kwargs)  # any nn.Module: its input has its own name
            return self.base_model(**given, **kwargs)

    def generate(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The base model's `generate`, with the adapter at work, or one for each row."""
        given = next(
            (x for x in (*args[:1], *map(kwargs.get, ("inputs", "input_ids", "inputs_embeds"))) if x is not None), None
        )
        if adapter_names is not None and len(adapter_names) != (1 if given is None else len(given)):
            raise ConfigError(
                f"adapter_names has {len(adapter_names)} names for {1 if given is None else len(given)} rows: "
                "name the adapter of each row."
            )
        with self._rows(adapter_names, repeated=True):
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    def _rows(self, names: list[str] | None, *, repeated: bool = False) -> AbstractContextManager[None]:
        if names is None:
            return nullcontext()
        if isinstance(names, str):
            raise ConfigError(f"adapter_names must be a list, the adapter of each row, not the string {names!r}.")
        for name in names:
            if name != BASE:
                self._known(name)
        if self.training:
            raise ConfigError("adapter_names is for inference: call eval() first.")
        return self.injection.by_rows(names, repeated=repeated)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        """The base model's function of this name, for its embeddings and head and those that adapters have saved.

        Raises:
            ConfigError: The base model has none, or an adapter tunes them by parameters of the present size.
        """
        if not isinstance(self.get_base_model(), PreTrainedModel):
            raise ConfigError(
                f"{type(self.get_base_model()).__name__} has no embeddings that transformers could resize."
            )
        return self.injection.resize_token_embeddings(*args, **kwargs)


# PEFT has a class a task. Here one serves all, and answers to their names, so that scripts port.
PeftModelForCausalLM = PeftModelForSeq2SeqLM = PeftModelForSequenceClassification = PeftModel
PeftModelForTokenClassification = PeftModelForQuestionAnswering = PeftModelForFeatureExtraction = PeftModel
