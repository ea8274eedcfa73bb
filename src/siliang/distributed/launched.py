"""The strategy of an accelerate config, as settings of a run's `distributed`."""

from __future__ import annotations

import os

from siliang.language import Bilingual
from siliang.secrets import short_repr
from siliang.types import ConfigError

SWITCH = "ACCELERATE_USE_"
SWITCHES = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
ZERO = "ACCELERATE_DEEPSPEED_"


def accelerate_strategy() -> dict[str, object]:
    """Settings of `distributed` from the variables that `accelerate launch` sets; {} if they name no strategy.

    The variables are removed: siliang shards the model itself, and accelerate would do so a second time.

    Raises:
        ConfigError: The accelerate config has a strategy that siliang does not have.
    """
    switched_on = {name for name in SWITCHES if os.environ.get(SWITCH + name, "").lower() == "true"}
    zero = {name.removeprefix(ZERO): os.environ.pop(name) for name in list(os.environ) if name.startswith(ZERO)}
    for name in ("FSDP", "DEEPSPEED"):
        os.environ.pop(SWITCH + name, None)
    for other in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        if other in switched_on:
            raise ConfigError(
                Bilingual(
                    f"accelerate's configuration has {other.lower()}, which siliang does not use. "
                    "Allowed there: MULTI_GPU, MULTI_CPU, FSDP, DEEPSPEED.",
                    f"accelerate 的配置中有 {other.lower()}，siliang 不使用它。可用："
                    "MULTI_GPU、MULTI_CPU、FSDP、DEEPSPEED。",
                )
            )
    if "FSDP" in switched_on:
        return {"strategy": "fsdp"}
    if "DEEPSPEED" not in switched_on:
        return {}
    if file := zero.get("CONFIG_FILE"):
        return {"strategy": "deepspeed", "deepspeed": file}
    stage = zero.get("ZERO_STAGE", "2")
    if stage not in ("0", "1", "2", "3"):
        raise ConfigError(
            Bilingual(
                f"accelerate's configuration has zero_stage = {short_repr(stage)}: must be 1, 2 or 3.",
                f"accelerate 的配置中 zero_stage = {short_repr(stage)}：只能是 1、2 或 3。",
            )
        )
    settings: dict[str, object] = {"stage": int(stage)}
    for name, key in (("OFFLOAD_OPTIMIZER_DEVICE", "offload_optimizer"), ("OFFLOAD_PARAM_DEVICE", "offload_param")):
        if (device := zero.get(name, "none")) != "none":
            settings[key] = {"device": device}
    return {"strategy": "deepspeed", "deepspeed": {"zero_optimization": settings}}
