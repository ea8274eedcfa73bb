"""What of DeepSpeed's own configuration goes along with a run's settings. Torch is not needed to read run.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from siliang.safe_json import JsonError, read_json
from siliang.types import ConfigError, nearest

# Of DeepSpeed's configuration, what siliang can go along with ...
DEEPSPEED_KEYS = (
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "bf16",
    "fp16",
    "optimizer",
    "scheduler",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "aio",
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "comms_logger",
)
# ... and what its own settings say
SAID_BY: dict[str, str] = {
    "train_batch_size": "train.batch_size and train.gradient_accumulation",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "gradient_clipping": "train.max_grad_norm",
}


def zero_settings(value: Any) -> Any:
    """A mapping, or the one in the .json file of that name, with nothing in it that would contradict the run.

    Raises:
        ConfigError: There is; or it is not to be read.
    """
    where = "distributed.deepspeed"
    if isinstance(value, str):
        where, value = f"{where} = {value}", _read_json(Path(value))
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: must be a mapping, or the name of a .json file that holds one.")
    for key, inner in value.items():
        if key in SAID_BY:
            if inner != "auto":
                raise ConfigError(f'{where}: {key} = {inner!r}: {SAID_BY[key]} says that. Leave it out, or "auto".')
        elif key not in DEEPSPEED_KEYS:
            allowed = ", ".join((*DEEPSPEED_KEYS, *SAID_BY))
            raise ConfigError(
                f"{where}: {key} is not supported.{nearest(str(key), DEEPSPEED_KEYS)} Allowed: {allowed}."
            )
        elif key in ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler") and not isinstance(inner, dict):
            raise ConfigError(f"{where}: {key} must be a mapping.")
    for key in ("bf16", "fp16"):
        if (said := value.get(key, {}).get("enabled", "auto")) != "auto":
            raise ConfigError(f'{where}: {key}.enabled = {said!r}: train.precision says that. Set it to "auto".')
    for key, instead in (("optimizer", "train.learning_rate, weight_decay"), ("scheduler", "train.schedule")):
        fixed = [name for name, said in value.get(key, {}).get("params", {}).items() if said != "auto"]
        kind = value.get(key, {}).get("type", "AdamW")
        if fixed or (key == "optimizer" and kind not in ("Adam", "AdamW")):
            raise ConfigError(
                f"{where}: {key} is siliang's own ({instead}): AdamW, with the schedule of every run. Leave it out, or "
                'all of its params "auto".'
            )
    stage = value.get("zero_optimization", {}).get("stage", 2)
    if stage not in (1, 2, 3):
        raise ConfigError(f"{where}: zero_optimization.stage = {stage!r}: must be 1, 2 or 3.")
    return value


def _read_json(path: Path) -> Any:
    try:
        return read_json(path, most_bytes=2**20)
    except JsonError as error:
        raise ConfigError(f"distributed.deepspeed = {error.place(path)}: not readable as JSON: {error}.") from None
    except OSError as error:
        raise ConfigError(f"distributed.deepspeed = {path}: cannot be read: {error.strerror or error}.") from None
