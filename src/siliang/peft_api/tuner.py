"""A base model with adapters in its layers, and the functions that PEFT's models of this kind have."""

# The names are PEFT's, and mean other things in PreTrainedModel.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from siliang.adapters.adapter import AttachedAdapter
from siliang.adapters.combine import MajoritySign
from siliang.adapters.injection import Injection
from siliang.methods.config import PeftConfig
from siliang.methods.ia3 import IA3Config
from siliang.methods.low_rank import LowRank
from siliang.peft_api.checks import check_config, check_known, check_new_name, check_without_peft, config_for
from siliang.peft_api.of_layers import is_convertible, targeted_modules, targeted_parameters
from siliang.peft_api.weighted import (
    Combination,
    check_base_unchanged,
    check_no_copy_twice,
    check_one_each,
    fill_factors,
    ia3_of_all,
    loras_of,
)


class TunerModel(Injection):
    """A base model with adapters, and the functions that PEFT's tuner models have.

    Args:
        model: The base model.
        peft_config: The config of a first adapter; None for none.
        adapter_name: Its name.

    Attributes:
        prefix: What the names of the method's parameters begin with, as in PEFT.
        uses_shared_state: The layers share tensors that a model outside of this one would not have.
    """

    prefix: ClassVar[str] = ""
    uses_shared_state: ClassVar[bool] = False

    def __init_subclass__(cls, prefix: str = "", shared: bool = False) -> None:
        super().__init_subclass__()
        cls.prefix, cls.uses_shared_state = prefix, shared

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | None = None,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        *,
        for_prompts: bool = False,
    ) -> None:
        check_without_peft(model)
        super().__init__(model, for_prompts=for_prompts)
        if peft_config is not None:
            try:
                self.inject(adapter_name, peft_config)
            except BaseException:
                self.unload()
                raise

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configs of the adapters by name."""
        return {name: adapter.config for name, adapter in self.adapters.items()}

    def inject(self, name: str, peft_config: PeftConfig) -> None:
        """Attaches a new adapter and makes it the active one."""
        check_config(peft_config)
        check_new_name(name, self.adapters)
        self.add_adapter(name, config_for(self.model, peft_config))
        self.set_adapter(name)

    @property
    def targeted_module_names(self) -> list[str]:
        """The paths of the layers that the adapters tune."""
        return targeted_modules(self)

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The paths of the parameters that LoRA's target_parameters names."""
        return targeted_parameters(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` works on an adapter."""
        check_known(adapter_name, self.adapters)
        return is_convertible(self, adapter_name)

    # ---- which adapters are active ----

    @property
    def active_adapters(self) -> list[str]:
        return list(self.active)

    @property
    def active_adapter(self) -> str | list[str]:
        return self.active[0] if len(self.active) == 1 else list(self.active)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes adapters the active ones, and trained unless they were loaded for inference."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            check_known(name, self.adapters)
        self.set_active(*names)
        self.train_active(frozen=inference_mode)

    def train_active(self, *, frozen: bool = False) -> None:
        """Trains the active adapters that were not loaded for inference, and freezes the others."""
        for name, adapter in self.adapters.items():
            adapter.set_trainable(name in self.active and not adapter.config.inference_mode and not frozen)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Trains adapters, or freezes them, active or not."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            check_known(name, self.adapters)
            self.adapters[name].set_trainable(requires_grad)

    def disable_adapter_layers(self) -> None:
        """Lets the model compute as the base model does. The adapters are frozen meanwhile, as in PEFT."""
        self.switch(on=False)
        self.train_active(frozen=True)

    def enable_adapter_layers(self) -> None:
        """Lets the model compute with its adapters again."""
        self.switch(on=True)
        self.train_active()

    # ---- merging, under PEFT's names ----

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Adds adapters (the active ones) into the weights, until `unmerge_adapter`."""
        self.merge(adapter_names, safe=safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Adds adapters (the active ones) into the weights, and returns the plain base model.

        Raises:
            MergeError: The base model is quantized, or, with `safe_merge`, an adapter is broken.
        """
        return self.merge_for_good(adapter_names, safe=safe_merge, progress=progressbar)

    def unmerge_adapter(self) -> None:
        """Takes merged adapters out of the weights again, bit for bit."""
        self.unmerge()

    # ---- combining ----

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: MajoritySign = "total",
    ) -> None:
        """Adds an adapter made of several of LoRA or of IA3, inactive and frozen. As in PEFT nothing happens where the
        name is taken. Adapters of IA3 take no arguments but the weights.

        Args:
            adapters: Their names.
            weights: One for each; negative ones take away.
            combination_type: See `weighted.COMBINATIONS`. cat and svd are exact up to the rank; linear is rough.
            svd_rank: The new rank for svd; None: the largest.
            svd_clamp: The quantile of magnitudes at which A and B are cut off.
            svd_full_matrices, svd_driver: Without effect: the result is the same.
            density: The share of each tensor that is kept; for ties, dare and magnitude_prune.
            majority_sign_method: Of ties: "total" or "frequency".

        Raises:
            ConfigError: The adapters cannot be combined. Nothing has been added then.
        """
        if adapter_name in self.adapters:
            return
        for name in adapters:
            check_known(name, self.adapters)
        chosen = [self.adapters[name] for name in adapters]
        ia3 = [config for adapter in chosen if isinstance(config := adapter.config, IA3Config)]
        if ia3 and len(ia3) == len(chosen):
            self._add_weighted_ia3(chosen, ia3, adapters, weights, adapter_name)
            return
        loras = loras_of(chosen)
        how = Combination(
            adapters=adapters,
            weights=weights,
            way=combination_type,
            svd_rank=svd_rank,
            svd_clamp=svd_clamp,
            density=density,
            majority_sign=majority_sign_method,
        )
        combined = how.config(loras)
        for name in adapters:
            check_base_unchanged(name, self.adapters[name].layers.values())
        active = self.active
        self.add_adapter(adapter_name, combined)
        try:
            for path, new in self.adapters[adapter_name].layers.items():
                own = zip(adapters, weights, strict=True)
                parts = [(self.adapters[name].layers.get(path), w) for name, w in own]
                found = [(part, w) for part, w in parts if isinstance(part, LowRank)]
                assert isinstance(new, LowRank)
                how.fill(new, found)
        except BaseException:
            self.delete_adapter(adapter_name)
            raise
        assert self.active == active

    def _add_weighted_ia3(
        self,
        chosen: Sequence[AttachedAdapter],
        configs: Sequence[IA3Config],
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
    ) -> None:
        check_one_each(adapters, weights)
        check_no_copy_twice(chosen)
        self.add_adapter(adapter_name, ia3_of_all(configs))
        try:
            for path, new in self.adapters[adapter_name].layers.items():
                own = zip(chosen, weights, strict=True)
                fill_factors(path, new, [(adapter.layers.get(path), weight) for adapter, weight in own])
        except BaseException:
            self.delete_adapter(adapter_name)
            raise
