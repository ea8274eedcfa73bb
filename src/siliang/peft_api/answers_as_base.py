"""What transformers calls on a PeftModel as on any PreTrainedModel. Most of it is passed on to the base model."""

# Class attributes of PreTrainedModel are properties here, because they are the base model's; `peft_config` is PEFT's.
# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from siliang.adapters.active_rows import of_tasks
from siliang.language import Bilingual
from siliang.methods.config import BASE, PeftConfig
from siliang.peft_api.checks import check_known
from siliang.peft_api.tuner import TunerModel
from siliang.peft_checks import refresh
from siliang.types import ConfigError


class AnswersAsBase(PreTrainedModel):
    """A PreTrainedModel whose forward, `generate` and properties are those of the base model.

    It is a PreTrainedModel so that the stock Trainer saves it through `save_pretrained`, which makes its checkpoints
    adapter folders: the Trainer does so only for that class and for peft's own. It has no config or generation code of
    its own: what it does not define is the base model's.

    Attributes:
        injection: All that is attached.
        peft_config: The configs of the adapters by name.
    """

    injection: TunerModel
    peft_config: dict[str, PeftConfig]

    def get_base_model(self) -> nn.Module:
        """The base model, with what is attached still in it."""
        return self.injection.model

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter computes."""
        return bool(self.injection.active) and not self.injection.is_disabled

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Lets reentrant checkpoints of a base model see that a gradient is wanted: of a quantized one,
        `prepare_model_for_kbit_training` has done it.
        """
        if isinstance(model, PreTrainedModel) and not getattr(model, "is_quantized", False):
            model.enable_input_require_grads()

    @property
    def modules_to_save(self) -> set[str] | None:
        """The endings of the modules of which an adapter has a copy; None where there are none."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AnswersAsBase:
        """Moves the parameters that are not in the model now together with it."""
        super()._apply(fn, recurse)
        for p in {id(p): p for p in self.injection.attachments.parked_parameters()}.values():
            p.data = fn(p.data)
        return self

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
        task_ids: Tensor | Sequence[int] | int | None = None,
        adapter_names: list[str] | None = None,
        **kwargs: object,
    ) -> object:
        """The base model's forward. The names are written out because the stock Trainer reads them off here.

        Args:
            task_ids: The task of each row of the batch, (B,), for methods that train several; one number for all.
            adapter_names: The adapter of each row of the batch, "__base__" for none; None: the active one for all.

        Raises:
            ConfigError: The active adapter has several tasks and `task_ids` is not given, or it has no such task.
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
        with self._rows(adapter_names), of_tasks(self.injection, task_ids):
            if given.keys() <= {"input_ids"} and not isinstance(self.get_base_model(), PreTrainedModel):
                return self.base_model(*given.values(), **kwargs)  # any nn.Module: its input has its own name
            return self.base_model(**given, **kwargs)

    def generate(
        self,
        *args: object,
        task_ids: Tensor | Sequence[int] | int | None = None,
        adapter_names: list[str] | None = None,
        **kwargs: object,
    ) -> Any:
        """The base model's `generate`, with the active adapter, or one for each row; `task_ids` as for `forward`."""
        inputs = (*args[:1], *map(kwargs.get, ("inputs", "input_ids", "inputs_embeds")))
        rows = next((len(x) for x in inputs if isinstance(x, Sized)), 1)
        if adapter_names is not None and len(adapter_names) != rows:
            raise ConfigError(
                Bilingual(
                    f"adapter_names has {len(adapter_names)} names for {rows} rows: name the adapter of each row.",
                    f"adapter_names 有 {len(adapter_names)} 个名称，而样本有 {rows} 条：请写出每条样本的适配器。",
                )
            )
        with self._rows(adapter_names, repeated=True), of_tasks(self.injection, task_ids, repeated=True):
            return cast(Callable[..., object], self.get_base_model().generate)(*args, **kwargs)

    def _rows(self, names: list[str] | None, *, repeated: bool = False) -> AbstractContextManager[None]:
        if names is None:
            return nullcontext()
        if isinstance(names, str):
            raise ConfigError(
                Bilingual(
                    f"adapter_names must be a list, the adapter of each row, not the string {names!r}.",
                    f"adapter_names 应为列表，写出每条样本的适配器，而不是字符串 {names!r}。",
                )
            )
        for name in names:
            if name != BASE:
                check_known(name, self.peft_config)
        if self.training:
            raise ConfigError(
                Bilingual(
                    "adapter_names is for inference: call eval() first.", "adapter_names 只用于推理：请先调用 eval()。"
                )
            )
        return self.injection.by_rows(names, repeated=repeated)

    def resize_token_embeddings(self, *args: object, **kwargs: object) -> nn.Module:
        """The base model's function of this name, for its embeddings and head and those that adapters have saved.

        Raises:
            ConfigError: The base model has none, or an adapter tunes them by parameters of the present size.
        """
        if not isinstance(self.get_base_model(), PreTrainedModel):
            raise ConfigError(
                Bilingual(
                    f"{type(self.get_base_model()).__name__} has no embeddings that transformers could resize.",
                    f"{type(self.get_base_model()).__name__} 没有 transformers 能调整大小的嵌入。",
                )
            )
        return self.injection.resize_token_embeddings(*args, **kwargs)

    # ---- what transformers reads of a model ----

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base model's loss takes the Trainer's count of labelled tokens.

        A Trainer reads it when it is made, also one that was imported after the model was made.
        """
        refresh()
        base = self.get_base_model()
        if hasattr(base, "accepts_loss_kwargs"):
            return bool(base.accepts_loss_kwargs)
        parameters = inspect.signature(base.forward).parameters.values()
        return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)

    @property
    def base_model(self) -> nn.Module:
        found = self._modules["base_model"]
        assert found is not None
        return found

    @property
    def main_input_name(self) -> str:
        return getattr(self.get_base_model(), "main_input_name", "input_ids")

    @property
    def supports_gradient_checkpointing(self) -> bool:
        return getattr(self.get_base_model(), "supports_gradient_checkpointing", False)

    @property
    def _no_split_modules(self) -> set[str] | list[str] | None:
        return getattr(self.get_base_model(), "_no_split_modules", None)

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """Tells the stock Trainer that a quantized model has adapters: it refuses to train one without."""
        return bool(getattr(self.get_base_model(), "is_quantized", False))

    def can_generate(self) -> bool:
        base = self.get_base_model()
        return isinstance(base, PreTrainedModel) and base.can_generate()

    def get_input_embeddings(self) -> nn.Module:
        return cast(PreTrainedModel, self.get_base_model()).get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return cast(PreTrainedModel, self.get_base_model()).get_output_embeddings()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # before __init__ has set it: without this line the next one would recurse without end
            if name in ("base_model", "injection") or "base_model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_model, name)
