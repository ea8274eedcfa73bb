"""What `accelerate launch` was told about sharing a model, in the words of a run's `distributed`."""

from __future__ import annotations

import os
from typing import Any

from siliang.types import ConfigError

SWITCH = "ACCELERATE_USE_"
ZERO = "ACCELERATE_DEEPSPEED_"


def asked_of_accelerate() -> dict[str, Any]:
    """What an accelerate config asks for, as `distributed` has it; {} where it leaves that open.

    It is taken out of the environment: siliang shares the model out itself, and accelerate would do so once more.

    Raises:
        ConfigError: It asks for what siliang does not do.
    """
    mine = [name for name in os.environ if name.startswith(ZERO) or name in (SWITCH + "FSDP", SWITCH + "DEEPSPEED")]
    said = {name: os.environ.pop(name).lower() if name.startswith(SWITCH) else os.environ.pop(name) for name in mine}
    for other in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(SWITCH + other, "").lower() == "true":
            raise ConfigError(
                f"accelerate's configuration asks for {other.lower()}, which siliang does not use. "
                "Allowed there: MULTI_GPU, MULTI_CPU, FSDP, DEEPSPEED."
            )
    if said.get(SWITCH + "FSDP") == "true":
        return {"strategy": "fsdp"}
    if said.get(SWITCH + "DEEPSPEED") != "true":
        return {}
    if file := said.get(ZERO + "CONFIG_FILE"):
        return {"strategy": "deepspeed", "deepspeed": file}
    zero: dict[str, Any] = {"stage": int(said.get(ZERO + "ZERO_STAGE", "2"))}
    for name, key in (("OFFLOAD_OPTIMIZER_DEVICE", "offload_optimizer"), ("OFFLOAD_PARAM_DEVICE", "offload_param")):
        if (device := said.get(ZERO + name, "none")) != "none":
            zero[key] = {"device": device}
    return {"strategy": "deepspeed", "deepspeed": {"zero_optimization": zero}}
