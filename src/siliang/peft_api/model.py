"""PeftModel: a base model with adapters, under the names of Hugging Face PEFT."""

# The names are PEFT's, and mean other things in PreTrainedModel.
# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from siliang.adapters.adapter import frozen
from siliang.adapters.adapter_state import adapter_state
from siliang.adapters.checks import check_not_merged
from siliang.adapters.files import size_errors
from siliang.language import Bilingual
from siliang.methods.config import PeftConfig
from siliang.models.quantized import keep_as_stored
from siliang.peft_api.card import write_card
from siliang.peft_api.checks import check_config, check_known, check_new_name, check_without_peft, config_for
from siliang.peft_api.describes import DescribesItself
from siliang.peft_api.saved import (
    AdapterToSave,
    LoadResult,
    SavedAdapter,
    check_saving,
    for_hub,
    renames_of,
    save_adapters,
)
from siliang.peft_api.tuner import TunerModel
from siliang.peft_api.tuners import TUNERS
from siliang.peft_checks import refresh
from siliang.types import ConfigError, TaskType

_BY_TASK: dict[TaskType, type[PeftModel]] = {}  # the classes of for_tasks.py


class PeftModel(DescribesItself):
    """A base model with named adapters, one of which is active.

    With adapters in layers `injection` is `base_model`. With prompts `base_model` is the base model itself, and
    `prompt_encoder` holds the prompts, as in PEFT.

    Attributes:
        TASK: The task type of the models of this class; None for any.
    """

    TASK: ClassVar[TaskType | None] = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.TASK is not None:
            _BY_TASK[cls.TASK] = cls

    @classmethod
    def for_task(cls, task: TaskType | None) -> type[PeftModel]:
        """The class of the models of a task type."""
        return PeftModel if task is None else _BY_TASK.get(task, PeftModel)

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        *,
        autocast_adapter_dtype: bool = True,
        saved: SavedAdapter | None = None,
    ) -> None:
        refresh()
        nn.Module.__init__(self)  # PreTrainedModel's own would adjust the base model's config to this wrapper
        if isinstance(model, PeftModel):
            raise ConfigError(
                Bilingual(
                    "The model has adapters already: call its add_adapter, or unload() it first.",
                    "模型上已有适配器：请调用它的 add_adapter，或先调用 unload()。",
                )
            )
        check_without_peft(model)
        check_config(peft_config)
        self.peft_config = {}
        keep_as_stored(model)
        kind = TUNERS.get(peft_config.peft_type, TunerModel)
        injection = kind(model, for_prompts=peft_config.is_prompt_learning)
        self.__dict__["injection"] = injection
        self._modules["base_model"] = model if injection.for_prompts else injection
        try:
            self._add_adapter(adapter_name, peft_config, saved, autocast_adapter_dtype)
            self.set_adapter(adapter_name)
        except BaseException:
            self.unload()
            raise

    # ---- adapters ----

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Attaches another new adapter, inactive and frozen until `set_adapter`.

        Merged adapters are taken out of the weights, as in PEFT. For the arguments see `get_peft_model`.

        Raises:
            ConfigError: The name is taken, or the method cannot work on this model. It is unchanged then.
        """
        self._add_adapter(adapter_name, peft_config, None, autocast_adapter_dtype)

    def _add_adapter(self, name: str, peft_config: PeftConfig, saved: SavedAdapter | None, wide: bool) -> None:
        """Attaches an adapter and fills it from its files; where that fails it is removed again."""
        check_new_name(name, self.peft_config)
        saved = None if saved is None else saved.on(self.injection)
        config = config_for(self.get_base_model(), peft_config if saved is None else saved.config)
        self.injection.add_adapter(name, config, file=saved.sizes if saved is not None else None)
        if name in self.injection.prompts:
            self._modules["prompt_encoder"] = self.injection.prompts
        try:
            if not wide:
                self.injection.adapters[name].to_base_dtype()
            if saved is not None:
                saved.load_into(self.injection, name)
            self.injection.unmerge_with_warning(Bilingual("An adapter is added to", "向已合并适配器的模型添加适配器"))
        except BaseException:
            self.injection.delete_adapter(name)
            raise
        self.peft_config[name] = config

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **hub: Any,
    ) -> LoadResult:
        """Attaches an adapter from a folder (or a hub name), inactive until `set_adapter`.

        Where the model has an adapter of this name already, the file's weights are copied into that one, as in PEFT;
        merged adapters are taken out of the weights first. It stays active or not, and trained or frozen, as it was.

        Args:
            is_trainable: Train it, with its head, from now on; otherwise a new one stays frozen.
            autocast_adapter_dtype: See `get_peft_model`.
            torch_device, ephemeral_gpu_offload, low_cpu_mem_usage: Without effect: an adapter is where its layers are.
            key_mapping: Regular expressions that rewrite the file's keys; None: transformers' own for older files.
            hub: `subfolder`, and what the hub is asked with, such as `revision` and `token`.

        Raises:
            AdapterError: The files are damaged, incomplete, or do not fit the model, which is unchanged then.
            ConfigError: The model's adapter of this name has other settings than the file.
        """
        renames = key_mapping or renames_of(self.get_base_model())
        saved = SavedAdapter.read(
            model_id, is_trainable=is_trainable, with_training=True, key_mapping=renames, **for_hub(hub)
        )
        trained = is_trainable
        with size_errors(saved.folder):
            if adapter_name in self.peft_config:
                saved = saved.on(self.injection)
                saved.check_same(self.peft_config[adapter_name], adapter_name)
                self.injection.unmerge_with_warning(
                    Bilingual("Other weights are loaded into", "向已合并适配器的模型加载权重")
                )
                trained |= any(p.requires_grad for p in self.injection.adapters[adapter_name].parameters())
                saved.load_into(self.injection, adapter_name)
            else:
                self._add_adapter(adapter_name, saved.config, saved, autocast_adapter_dtype)
        self.injection.adapters[adapter_name].set_trainable(trained)
        return LoadResult([], [])

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Takes adapters off for good. Where they were the only active ones, another takes their place, as in PEFT.

        Raises:
            ConfigError: One is not there, or is merged into the weights. None has been taken off then.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for name in names:
            check_known(name, self.peft_config)
            check_not_merged(name, self.injection.merged)
        before = self.injection.active
        for name in sorted(names, key=before.__contains__):  # the active ones last: none of these takes their place
            self.injection.delete_adapter(name)
            del self.peft_config[name]
        if self.injection.active != before:
            self.injection.train_active()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes one adapter (or several, which add up) the active one, and trained unless loaded for inference.

        Merged adapters are taken out of the weights first, as in PEFT.

        Args:
            inference_mode: Leave it frozen.

        Raises:
            ConfigError: One is not there, or they cannot be active together. The model is unchanged then.
        """
        self.injection.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Trains adapters, or freezes them, active or not."""
        self.injection.set_requires_grad(adapter_names, requires_grad)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """See `TunerModel.add_weighted_adapter`."""
        self.injection.add_weighted_adapter(*args, **kwargs)
        self.peft_config.update(self.injection.peft_config)

    @property
    def active_adapter(self) -> str | None:
        """The active adapter, the first of several, even while it is disabled; None where there is none."""
        return next(iter(self.injection.active), None)

    @property
    def active_adapters(self) -> list[str]:
        return list(self.injection.active)

    @property
    def active_peft_config(self) -> PeftConfig:
        if self.active_adapter is None:
            raise ConfigError(
                Bilingual(
                    "No adapter is active: make one so with set_adapter.",
                    "没有激活的适配器：请用 set_adapter 激活一个。",
                )
            )
        return self.peft_config[self.active_adapter]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model computes as the base model does, merged adapters or not; adapters are frozen."""
        with self.injection.disabled(), frozen(self.injection.adapters.values()):
            yield

    # ---- merging and unloading ----

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
            MergeError: The base model is quantized, the adapter is a prompt, or, with `safe_merge`, broken.
        """
        names = self._chosen(adapter_names)
        base = self.injection.merge_for_good(names, safe=safe_merge, progress=progressbar)
        self.peft_config.clear()
        return base

    def merge_adapter(self, adapter_names: list[str] | str | None = None, safe_merge: bool = False) -> None:
        """Adds adapters (the active ones) into the weights in place, until `unmerge_adapter`, which is exact.

        A layer with merged adapters computes with these alone, as in PEFT, whichever is active; heads are the active
        one's. Until then the original weights of the tuned layers are held as well.

        Raises:
            MergeError: As for `merge_and_unload`; nothing is merged then.
        """
        self.injection.merge(self._chosen(adapter_names), safe=safe_merge)

    def unmerge_adapter(self) -> None:
        """Takes merged adapters out of the weights again, bit for bit."""
        self.injection.unmerge()

    def _chosen(self, names: list[str] | str | None) -> list[str] | None:
        chosen = [names] if isinstance(names, str) else names
        for name in chosen or ():
            check_known(name, self.peft_config)
        return chosen

    # ---- files ----

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        *,
        state_dict: dict[str, Tensor] | None = None,
        model_card: bool = True,
        to_resume: bool = False,
    ) -> None:
        """Writes the adapters: "default" into the folder itself, others into folders of their names inside it.

        Args:
            safe_serialization: True: siliang writes no pickles, which run code where they are loaded.
            selected_adapters: Which; None for all.
            save_embedding_layers: See `get_peft_model_state_dict`.
            is_main_process: Only the main process writes.
            path_initial_model_for_weight_conversion: The folder of the same adapter as it was before training, for one
                with init_lora_weights "pissa" or "olora": what is written is plain LoRA of twice the rank, on the base.
            state_dict: See `get_peft_model_state_dict`.
            to_resume: One with init_lora_weights "corda" or "lora_ga" is so converted in any case, but with this.
            model_card: Write README.md too, as PEFT does, without paths of this machine.

        Raises:
            ConfigError: An adapter is not there, or cannot be turned into plain LoRA. Nothing has been written then.
        """
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        for name in names:
            check_known(name, self.peft_config)
        check_saving(save_directory, safe_serialization)
        found: dict[str, AdapterToSave] = {}
        for name in names:
            tensors = self.adapter_state(name, state_dict, save_embedding_layers)  # gathered by all processes
            adapter, initial = self.injection.adapters[name], path_initial_model_for_weight_conversion
            found[name] = AdapterToSave.of(adapter, self.peft_config[name], tensors, initial, to_resume)
        if is_main_process:
            save_adapters(save_directory, found)
            if model_card and names:
                self.create_or_update_model_card(save_directory)

    def create_or_update_model_card(self, output_dir: str | Path, facts: Mapping[str, str] | None = None) -> None:
        """Writes README.md with the base model and the method; other text of a README.md that exists is kept."""
        write_card(Path(output_dir), self.active_peft_config, facts, self.get_base_model())

    def adapter_state(
        self,
        name: str,
        state_dict: dict[str, Tensor] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
    ) -> dict[str, Tensor]:
        """See `get_peft_model_state_dict`. The tensors are live where they can be."""
        check_known(name, self.peft_config)
        keys = None
        if state_dict is not None:
            named = [*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)]
            keys = {id(t): key for key, t in named}
        return adapter_state(self.injection, name, state_dict=state_dict, keys=keys, embeddings=save_embedding_layers)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        torch_device: str | None = None,
        **hub: Any,
    ) -> PeftModel:
        """Attaches a saved adapter to its base model.

        Args:
            model_id: The adapter's folder, or its name on the hub.
            is_trainable: Train it further; otherwise it is frozen and the model put into eval mode. P-tuning and a
                projected prefix continue where siliang saved them; PEFT's files lack what made the prompt: then it is
                trained itself.
            config: Used in the file's place.
            autocast_adapter_dtype: This and what follows: see `load_adapter`.

        Raises:
            AdapterError: The files are damaged, incomplete, or do not fit the model, which is unchanged then.
        """
        saved = SavedAdapter.read(
            model_id,
            is_trainable=is_trainable,
            with_training=is_trainable,
            config=config,
            key_mapping=key_mapping or renames_of(model),
            **for_hub(hub),
        )
        kind = cls.for_task(saved.config.task_type) if cls is PeftModel else cls
        with size_errors(saved.folder):
            peft_model = kind(
                model, saved.config, adapter_name, saved=saved, autocast_adapter_dtype=autocast_adapter_dtype
            )
        return peft_model if is_trainable else peft_model.eval()
