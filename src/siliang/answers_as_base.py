"""A PreTrainedModel that answers as another model does: the face that PeftModel shows to transformers."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from siliang.peft_checks import refresh


class AnswersAsBase(PreTrainedModel):
    """What PreTrainedModel defines and the base model must answer.

    It is a PreTrainedModel so that the stock Trainer saves it through `save_pretrained`, which makes its checkpoints
    adapter folders: the Trainer does so only for that class and for peft's own. It holds no config or generation
    machinery of its own: what it does not define is the base model's.
    """

    def get_base_model(self) -> nn.Module:
        """The base model."""
        raise NotImplementedError

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base model's loss takes the Trainer's count of labelled tokens.

        A Trainer asks for it when it is made, also one that was imported after the model was made.
        """
        refresh()
        base = self.get_base_model()
        if hasattr(base, "accepts_loss_kwargs"):
            return bool(base.accepts_loss_kwargs)
        parameters = inspect.signature(base.forward).parameters.values()
        return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)

    @property
    def base_model(self) -> Any:  # type: ignore[override]
        return self._modules["base_model"]

    @property
    def main_input_name(self) -> str:  # type: ignore[override]
        return getattr(self.get_base_model(), "main_input_name", "input_ids")

    @property
    def supports_gradient_checkpointing(self) -> bool:  # type: ignore[override]
        return getattr(self.get_base_model(), "supports_gradient_checkpointing", False)

    @property
    def _no_split_modules(self) -> Any:  # type: ignore[override]
        return getattr(self.get_base_model(), "_no_split_modules", None)

    @property
    def _hf_peft_config_loaded(self) -> bool:  # type: ignore[override]
        """How the stock Trainer is told that a quantised model has adapters: it refuses to train one without."""
        return bool(getattr(self.get_base_model(), "is_quantized", False))

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
            # not there yet: without this line the next one would ask for it for ever
            if name in ("base_model", "injection") or "base_model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_model, name)
