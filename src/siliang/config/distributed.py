"""How several devices share a training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from siliang.config.section import Section, is_recorded
from siliang.types import ConfigError
from siliang.zero_settings import zero_settings


def _zero_settings(value: Any, info: ValidationInfo) -> Any:
    return value if is_recorded(info) and isinstance(value, str) else zero_settings(value)


class DistributedConfig(Section):
    """How several devices share a training."""

    strategy: Literal["auto", "ddp", "fsdp", "deepspeed"] = "auto"
    """ddp: every device holds the whole model. fsdp: its weights are dealt out over the devices. auto: ddp where the
    plan says that it fits, fsdp otherwise. deepspeed: its ZeRO; needs DeepSpeed."""
    zero_stage: Annotated[int, Field(ge=1, le=3)] | None = None
    """Of deepspeed. 1: the optimiser's state is dealt out. 2: gradients, too. 3: weights, too. None: what `deepspeed`
    says, otherwise 2."""
    deepspeed: Annotated[dict[str, Any] | None, BeforeValidator(_zero_settings)] = None
    """DeepSpeed's own configuration, a mapping or the name of a .json file, as TrainingArguments(deepspeed=...) takes
    it. What siliang's settings say (batches, clipping, precision, learning rate) is left out or "auto" there."""

    @property
    def stage(self) -> int:
        """Of DeepSpeed's ZeRO; 0 for every other strategy."""
        if self.strategy != "deepspeed":
            return 0
        return self.zero_stage or (self.deepspeed or {}).get("zero_optimization", {}).get("stage", 2)

    @property
    def zero(self) -> dict[str, Any]:
        """DeepSpeed's configuration, with the stage."""
        settings = self.deepspeed or {}
        return settings | {"zero_optimization": {**settings.get("zero_optimization", {}), "stage": self.stage}}

    @model_validator(mode="after")
    def _of_deepspeed(self) -> DistributedConfig:
        for name in ("zero_stage", "deepspeed"):
            if getattr(self, name) is not None and self.strategy != "deepspeed":
                raise ConfigError(
                    f"distributed.{name} has no effect with distributed.strategy = {self.strategy}: that has to be "
                    "deepspeed."
                )
        said = (self.deepspeed or {}).get("zero_optimization", {}).get("stage")
        if None not in (self.zero_stage, said) and self.zero_stage != said:
            raise ConfigError(
                f"zero_stage is {self.zero_stage}, but distributed.deepspeed says stage {said}: leave one out."
            )
        return self
