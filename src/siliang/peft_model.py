"""get_peft_model and PeftModel: a base model with adapters, under the names of Hugging Face PEFT. Thin: the work is in
inject.py (attaching), checkpoint.py (files) and merge.py.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from siliang.checkpoint import load_tensors, read_adapter, save_adapter
from siliang.inject import Injection
from siliang.methods.base import CONFIG_NAME, LayerConfig, PeftConfig
from siliang.types import AdapterError, ConfigError, nearest


def get_peft_model(model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default") -> PeftModel:
    """Attaches a new adapter to `model`, freezes the rest, and makes the adapter the one that is trained.

    The model itself is changed; `PeftModel.unload()` gives it back.

    Args:
        peft_config: The method and its settings; copied, then completed (target modules, heads, base model's name).

    Raises:
        TargetError: The method's targets are not in the model. The model has not been changed then.
    """
    return PeftModel(model, peft_config, adapter_name)


class PeftModel(PreTrainedModel):
    """A base model with named adapters, one of which is active.

    It is a PreTrainedModel so that the stock Trainer saves it through `save_pretrained`, which makes its checkpoints
    adapter folders: the Trainer does so only for that class and for peft's own. It holds no config or generation
    machinery of its own: what it does not define is the base model's.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        *,
        lenient: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # PreTrainedModel's own would adjust the base model's config to this wrapper
        if isinstance(model, PeftModel):
            raise ConfigError("The model has adapters already: call its add_adapter, or unload() it first.")
        self.peft_config: dict[str, LayerConfig] = {}  # type: ignore[assignment]
        self._modules["base_model"] = Injection(model)
        try:
            self._add_adapter(adapter_name, peft_config, lenient=lenient)
        except BaseException:
            self.unload()
            raise
        self.set_adapter(adapter_name)
        if self.peft_config[adapter_name].inference_mode:
            self.base_model.train_only()

    # ---- adapters ----

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig) -> None:  # type: ignore[override]
        """Attaches another new adapter, inactive until `set_adapter`."""
        self._add_adapter(adapter_name, peft_config)

    def _add_adapter(self, name: str, peft_config: PeftConfig, *, lenient: bool = False) -> None:
        if not name or any(c in name for c in "./\\") or name == "__base__":
            raise ConfigError(f"adapter name {name!r}: use letters, digits, '-' and '_', at least one.")
        if name in self.peft_config:
            raise ConfigError(f"adapter {name!r} is there already: {', '.join(self.peft_config)}.")
        if not isinstance(peft_config, LayerConfig):
            raise ConfigError(f"{type(peft_config).__name__} is not a method's config: use LoraConfig or BitFitConfig.")
        config = copy.deepcopy(peft_config)
        base = self.get_base_model()
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
        if config.task_type is None:
            config.auto_mapping = {
                "base_model_class": type(base).__name__,
                "parent_library": type(base).__module__,
            }
        self.base_model.add_adapter(name, config, lenient=lenient)
        self.peft_config[name] = config

    def load_adapter(  # type: ignore[override]
        self, model_id: str | Path, adapter_name: str, is_trainable: bool = False
    ) -> None:
        """Attaches an adapter from a folder (or a hub name), inactive until `set_adapter`.

        Raises:
            AdapterError: The files are damaged, incomplete, or do not fit the model.
        """
        folder = adapter_folder(model_id)
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = not is_trainable
        tensors = read_adapter(folder)
        before = self.base_model.active
        self._add_adapter(adapter_name, config, lenient=True)
        try:
            load_tensors(self.base_model, adapter_name, tensors, source=str(folder))
        finally:
            self.base_model.set_active(*before)

    def set_adapter(self, adapter_name: str) -> None:  # type: ignore[override]
        """Makes one adapter the active one, and, unless it was loaded for inference only, the trained one."""
        self._known(adapter_name)
        self.base_model.set_active(adapter_name)
        trainable = () if self.peft_config[adapter_name].inference_mode else (adapter_name,)
        self.base_model.train_only(*trainable)

    @property
    def active_adapter(self) -> str:
        return self.base_model.active[0]

    @property
    def active_adapters(self) -> list[str]:  # type: ignore[override]
        return list(self.base_model.active)

    @property
    def active_peft_config(self) -> LayerConfig:
        return self.peft_config[self.active_adapter]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model computes as the base model does."""
        before = self.base_model.active
        self.base_model.set_active()
        try:
            yield
        finally:
            self.base_model.set_active(*before)

    def _known(self, name: str) -> None:
        if name not in self.peft_config:
            raise ConfigError(
                f"adapter {name!r} is not there; there are {', '.join(self.peft_config)}."
                + nearest(name, self.peft_config)
            )

    # ---- off again ----

    def get_base_model(self) -> nn.Module:
        """The base model, with what is attached still in it."""
        return self.base_model.model

    def unload(self) -> nn.Module:
        """Takes the adapters off and returns the base model as it was, bit for bit."""
        return self.base_model.unload()

    def merge_and_unload(self, adapter_name: str | None = None) -> nn.Module:
        """Adds the adapter (the active one) into the weights and returns the plain base model.

        See `siliang.merge` for a merge that is proved.
        """
        name = self.active_adapter if adapter_name is None else adapter_name
        self._known(name)
        return self.base_model.unload(merge=name)

    # ---- files ----

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, selected_adapters: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Writes the adapters: "default" into the folder itself, others into folders of their names inside it.

        Args:
            selected_adapters: Which; None for all.
            kwargs: What the Trainer passes (`state_dict`, `is_main_process`); only the main process writes.
        """
        if not kwargs.get("is_main_process", True):
            return
        for name in selected_adapters or list(self.peft_config):
            self._known(name)
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            save_adapter(folder, self.base_model, name, self.peft_config[name])

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
            is_trainable: Go on training it; otherwise it is frozen and the model put into eval mode.
            config: Used in the file's place.

        Raises:
            AdapterError: The files are damaged, incomplete, or do not fit the model, which is unchanged then.
        """
        folder = adapter_folder(model_id)
        config = copy.deepcopy(config) or PeftConfig.from_pretrained(folder)
        config.inference_mode = not is_trainable
        tensors = read_adapter(folder)
        peft_model = cls(model, config, adapter_name, lenient=True)
        try:
            load_tensors(peft_model.base_model, adapter_name, tensors, source=str(folder))
        except AdapterError:
            peft_model.unload()
            raise
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
        **kwargs: Any,
    ) -> Any:
        """The base model's forward. The names are spelt out because the stock Trainer reads them off here."""
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
        if given.keys() <= {"input_ids"} and not isinstance(self.get_base_model(), PreTrainedModel):
            return self.base_model(*given.values(), **kwargs)  # any nn.Module: its input has its own name
        return self.base_model(**given, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, with the adapter at work."""
        return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base model's loss takes the Trainer's count of labelled tokens."""
        base = self.get_base_model()
        if hasattr(base, "accepts_loss_kwargs"):
            return bool(base.accepts_loss_kwargs)
        parameters = inspect.signature(base.forward).parameters.values()
        return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)

    # ---- what PreTrainedModel defines and the base model must answer ----

    @property
    def base_model(self) -> Injection:  # type: ignore[override]
        return self._modules["base_model"]  # type: ignore[return-value]

    @property
    def main_input_name(self) -> str:  # type: ignore[override]
        return getattr(self.get_base_model(), "main_input_name", "input_ids")

    @property
    def supports_gradient_checkpointing(self) -> bool:  # type: ignore[override]
        return getattr(self.get_base_model(), "supports_gradient_checkpointing", False)

    @property
    def _no_split_modules(self) -> Any:  # type: ignore[override]
        return getattr(self.get_base_model(), "_no_split_modules", None)

    def can_generate(self) -> bool:  # type: ignore[override]
        base = self.get_base_model()
        return isinstance(base, PreTrainedModel) and base.can_generate()

    def get_input_embeddings(self) -> nn.Module:
        return self.get_base_model().get_input_embeddings()  # type: ignore[operator]

    def get_output_embeddings(self) -> nn.Module | None:
        return self.get_base_model().get_output_embeddings()  # type: ignore[operator]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not there yet: without this line the next one would ask for it for ever
                raise
            return getattr(self.base_model, name)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters of any model, shared ones once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def adapter_folder(model_id: str | Path) -> Path:
    """The local folder of an adapter; a name that is no folder is looked up on the hub.

    Raises:
        AdapterError: It is neither.
    """
    path = Path(model_id)
    if path.is_dir():
        return path
    if path.is_absolute() or str(model_id).startswith(".") or str(model_id).count("/") != 1:
        raise AdapterError(f"There is no adapter folder {model_id}.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model_id), allow_patterns=[CONFIG_NAME, "adapter_model.*"]))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{model_id} is no folder here, and the hub did not give it: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
