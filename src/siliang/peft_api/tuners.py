"""The base models with adapters in their layers, under the names that PEFT has for them: `LoraModel` and its like.

They differ in little but their name: what a method does is in methods/.
"""

# The names are PEFT's, and mean other things in PreTrainedModel.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from siliang.adapters.active_rows import of_tasks
from siliang.language import Bilingual
from siliang.methods.adalora import AdaLora, AdaLoraConfig
from siliang.methods.config import PeftConfig
from siliang.methods.method import Adapter
from siliang.methods.xlora import Mixture
from siliang.peft_api.tuner import TunerModel
from siliang.types import ConfigError, PeftType


class LoraModel(TunerModel, prefix="lora_"):
    """With LoRA."""


class AdaLoraModel(TunerModel, prefix="lora_"):
    """With AdaLoRA."""

    def forward(self, *args: object, **kwargs: object) -> object:
        """As the model's; a loss has AdaLoRA's term in it while an adapter is trained, as in PEFT."""
        output = super().forward(*args, **kwargs)
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            for adapter in self._trained():
                loss = loss + AdaLora().extra_loss(adapter).to(loss)
            setattr(output, "loss", loss)  # noqa: B010, the output is of any class
        return output

    def update_and_allocate(self, global_step: int) -> None:
        """Takes ranks away from where they matter least. To be called after each optimizer step, before the gradients
        are set to zero.

        Args:
            global_step: Steps that are done, this one included.

        Raises:
            ConfigError: There are no gradients, or the config has no total_step.
        """
        for adapter in self._trained():
            AdaLora().after_step(adapter, global_step)

    def _trained(self) -> list[Adapter[AdaLoraConfig]]:
        found = [cast(Adapter[PeftConfig], self.adapters[name]) for name in self.active]
        return [
            cast(Adapter[AdaLoraConfig], adapter)
            for adapter in found
            if isinstance(adapter.config, AdaLoraConfig) and not adapter.config.inference_mode
        ]


class IA3Model(TunerModel, prefix="ia3_"):
    """With IA3."""


class LNTuningModel(TunerModel, prefix="ln_tuning_"):
    """With LN tuning."""


class LoHaModel(TunerModel, prefix="hada_"):
    """With LoHa."""


class LoKrModel(TunerModel, prefix="lokr_"):
    """With LoKr."""


class FourierFTModel(TunerModel, prefix="fourierft_"):
    """With FourierFT."""


class C3AModel(TunerModel, prefix="c3a_"):
    """With C3A."""


class OFTModel(TunerModel, prefix="oft_"):
    """With OFT."""


class BeftModel(TunerModel, prefix="beft_"):
    """With BEFT."""


class BOFTModel(TunerModel, prefix="boft_"):
    """With BOFT."""


class MissModel(TunerModel, prefix="miss_"):
    """With MiSS."""


class ShiraModel(TunerModel, prefix="shira_"):
    """With SHiRA."""


class VeraModel(TunerModel, prefix="vera_lambda_", shared=True):
    """With VeRA."""


class HiraModel(TunerModel, prefix="hira_"):
    """With HiRA."""


class DeloraModel(TunerModel, prefix="delora_"):
    """With DeLoRA."""


class GraloraModel(TunerModel, prefix="gralora_"):
    """With GraLoRA."""


class RandLoraModel(TunerModel, prefix="randlora_"):
    """With RandLoRA."""


class VBLoRAModel(TunerModel, prefix="vblora_", shared=True):
    """With VB-LoRA."""


class WaveFTModel(TunerModel, prefix="waveft_"):
    """With WaveFT."""


class HRAModel(TunerModel, prefix="hra_"):
    """With HRA."""


class TrainableTokensModel(TunerModel, prefix="trainable_tokens_"):
    """With trainable tokens."""


class RoadModel(TunerModel, prefix="road_"):
    """With RoAd."""


class OSFModel(TunerModel, prefix="osf_"):
    """With OSF."""


class LilyModel(TunerModel, prefix="lily_"):
    """With LILY."""


class PolyModel(TunerModel, prefix="poly_"):
    """With Poly."""

    def forward(self, *args: object, task_ids: Tensor | Sequence[int] | int | None = None, **kwargs: object) -> object:
        """As the model's, of rows of these tasks."""
        with of_tasks(self, task_ids):
            return super().forward(*args, **kwargs)


class XLoraModel(TunerModel, prefix="xlora_"):
    """With X-LoRA. The experts' weights of a batch are called its scalings here."""

    @property
    def mixture(self) -> Mixture:
        """What mixes the experts of the active adapter, or of the first one.

        Raises:
            ConfigError: No adapter mixes experts.
        """
        names = [*self.active, *self.adapters]
        found = (self.adapters[name].rows for name in names)
        if (mixture := next((one for one in found if isinstance(one, Mixture)), None)) is None:
            raise ConfigError(Bilingual("No adapter of the model is X-LoRA.", "模型没有 X-LoRA 适配器。"))
        return mixture

    def set_topk_lora(self, value: int | None) -> None:
        """Lets only so many experts compute at each token; None: all."""
        self.mixture.change(top_k_lora=value)

    def set_global_scaling_weight(self, weight: float) -> None:
        """Multiplies all experts' weights."""
        self.mixture.change(global_scaling_weight=float(weight))

    def get_global_scaling_weight(self) -> float:
        """See `set_global_scaling_weight`."""
        return self.mixture.config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """The experts' weights in the first pass; None: one over their number."""
        mixture = self.mixture
        mixture.change(scaling_pass_value=1 / len(mixture.config.adapters) if value is None else float(value))

    def get_latest_scalings(self) -> Tensor | None:
        """The last batch's weights, (B, N, L, E), before top_k_lora and the global weight; None before the first."""
        return self.mixture.latest

    def enable_scalings_logging(self) -> None:
        """Keeps the weights of each batch from now on."""
        self.mixture.logs = True

    def disable_scalings_logging(self) -> None:
        """Keeps no more, and forgets none."""
        self.mixture.logs = False

    def get_scalings_log(self) -> list[Tensor]:
        """The weights that were kept, a batch each."""
        return list(self.mixture.log)

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """By the length N of the batches: their places in the log, and their weights."""
        found: dict[int, tuple[list[int], list[Tensor]]] = {}
        for i, w in enumerate(self.mixture.log):
            places, tensors = found.setdefault(w.shape[1], ([], []))
            places.append(i)
            tensors.append(w)
        return found

    def clear_scalings_log(self) -> None:
        """Forgets what was kept."""
        self.mixture.log.clear()


class AdaptionPromptModel(TunerModel, prefix="adaption_prompt_"):
    """With LLaMA-Adapter."""


TUNERS: dict[str, type[TunerModel]] = {
    PeftType.LORA: LoraModel,
    PeftType.ADALORA: AdaLoraModel,
    PeftType.IA3: IA3Model,
    PeftType.LN_TUNING: LNTuningModel,
    PeftType.LOHA: LoHaModel,
    PeftType.LOKR: LoKrModel,
    PeftType.FOURIERFT: FourierFTModel,
    PeftType.C3A: C3AModel,
    PeftType.OFT: OFTModel,
    PeftType.BEFT: BeftModel,
    PeftType.BOFT: BOFTModel,
    PeftType.MISS: MissModel,
    PeftType.SHIRA: ShiraModel,
    PeftType.VERA: VeraModel,
    PeftType.HIRA: HiraModel,
    PeftType.DELORA: DeloraModel,
    PeftType.GRALORA: GraloraModel,
    PeftType.RANDLORA: RandLoraModel,
    PeftType.VBLORA: VBLoRAModel,
    PeftType.WAVEFT: WaveFTModel,
    PeftType.HRA: HRAModel,
    PeftType.TRAINABLE_TOKENS: TrainableTokensModel,
    PeftType.ROAD: RoadModel,
    PeftType.OSF: OSFModel,
    PeftType.LILY: LilyModel,
    PeftType.POLY: PolyModel,
    PeftType.XLORA: XLoraModel,
    PeftType.ADAPTION_PROMPT: AdaptionPromptModel,
}
