"""What a PeftModel says of itself: what it trains, layer by layer and as a whole, and what it can be made into."""

# `base_model` is a property of PreTrainedModel too.
# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false

from __future__ import annotations

from siliang.models.quantized import count_parameters
from siliang.peft_api.answers_as_base import AnswersAsBase
from siliang.peft_api.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status


class DescribesItself(AnswersAsBase):
    """The functions that only tell."""

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trained parameters, all parameters of the model that is there)."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Prints the counts in PEFT's form."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """See `get_layer_status` of siliang."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """See `get_model_status` of siliang."""
        return get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` works on an adapter."""
        return self.injection.supports_lora_conversion(adapter_name)
