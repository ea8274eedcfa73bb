"""The settings of training on several devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from siliang.config.section import Section, is_recorded
from siliang.language import Bilingual, local
from siliang.safety.safe_json import JsonError, read_json
from siliang.types import ConfigError, message_of, nearest

# Keys of a DeepSpeed configuration that a run may set
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
# Keys of a DeepSpeed configuration that siliang sets, and the settings that determine them
SET_BY: dict[str, str] = {
    "train_batch_size": "train.batch_size and train.gradient_accumulation",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "gradient_clipping": "train.max_grad_norm",
}


def _settings(value: object, info: ValidationInfo) -> object:
    return value if is_recorded(info) and isinstance(value, str) else deepspeed_settings(value)


class DistributedConfig(Section):
    """Training on several devices."""

    strategy: Literal["auto", "ddp", "fsdp", "deepspeed"] = "auto"
    """ddp: every device has a copy of the model. fsdp: the weights are sharded over the devices. auto: ddp if the
    plan predicts that the model fits, otherwise fsdp. deepspeed: DeepSpeed's ZeRO; needs DeepSpeed.

    ddp：每个设备都有完整的模型。fsdp：权重分片到各个设备。auto：预估放得下时用 ddp，否则用 fsdp。deepspeed：用
    DeepSpeed 的 ZeRO；需要安装 DeepSpeed。"""
    zero_stage: Annotated[int, Field(ge=1, le=3)] | None = None
    """The ZeRO stage of deepspeed. 1: the optimizer's state is sharded. 2: gradients, too. 3: weights, too. None: the
    stage in `deepspeed`, otherwise 2.

    deepspeed 的 ZeRO 阶段。1：优化器状态分片。2：梯度也分片。3：权重也分片。None：按 `deepspeed` 中的设置，否则为
    2。"""
    deepspeed: Annotated[dict[str, Any] | None, BeforeValidator(_settings)] = None
    """A DeepSpeed configuration: a mapping, or the name of a .json file, as for TrainingArguments(deepspeed=...).
    Values that siliang's settings determine (batches, clipping, precision, learning rate) must be absent or "auto".

    DeepSpeed 的配置：映射或 .json 文件名，与 TrainingArguments(deepspeed=...) 相同。由 siliang 的设置决定的值（批次、裁
    剪、精度、学习率）必须略去或写作 "auto"。"""

    @property
    def stage(self) -> int:
        """The stage of DeepSpeed's ZeRO; 0 for every other strategy."""
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
                    Bilingual(
                        f"distributed.{name} has no effect with distributed.strategy = {self.strategy}: it needs "
                        "deepspeed.",
                        f"distributed.{name} 在 distributed.strategy = {self.strategy} 时不起作用：只用于 deepspeed。",
                    )
                )
        stage = (self.deepspeed or {}).get("zero_optimization", {}).get("stage")
        if None not in (self.zero_stage, stage) and self.zero_stage != stage:
            raise ConfigError(
                Bilingual(
                    f"zero_stage is {self.zero_stage}, but distributed.deepspeed has stage {stage}: remove one.",
                    f"zero_stage 是 {self.zero_stage}，而 distributed.deepspeed 写的是 stage {stage}：请去掉其中一个。",
                )
            )
        return self


def deepspeed_settings(value: object) -> object:
    """Reads a DeepSpeed configuration (a mapping, or the name of a .json file), and checks it against the run.

    Raises:
        ConfigError: A key contradicts the run or is not supported, or the file cannot be read.
    """
    where = "distributed.deepspeed"
    if isinstance(value, str):
        where, value = f"{where} = {value}", _read_json(Path(value))
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ConfigError(
            Bilingual(
                f"{where}: must be a mapping, or the name of a .json file with a mapping.",
                f"{where}：应为映射，或一个 .json 文件的名称。",
            )
        )
    for key, inner in value.items():
        if key in SET_BY:
            if inner != "auto":
                raise ConfigError(
                    Bilingual(
                        f'{where}: {key} = {inner!r}: it is set by {SET_BY[key]}. Remove it, or write "auto".',
                        f'{where}：{key} = {inner!r}：这由 {SET_BY[key]} 决定。请去掉，或写 "auto"。',
                    )
                )
        elif key not in DEEPSPEED_KEYS:
            allowed = ", ".join((*DEEPSPEED_KEYS, *SET_BY))
            raise ConfigError(
                Bilingual(
                    f"{where}: {key} is not supported.{nearest(str(key), DEEPSPEED_KEYS)} Allowed: {allowed}.",
                    f"{where}：不支持 {key}。{nearest(str(key), DEEPSPEED_KEYS).zh}可用：{allowed}。",
                )
            )
        elif key in ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler") and not isinstance(inner, dict):
            raise ConfigError(Bilingual(f"{where}: {key} must be a mapping.", f"{where}：{key} 应为映射。"))
    for key in ("bf16", "fp16"):
        if (enabled := value.get(key, {}).get("enabled", "auto")) != "auto":
            raise ConfigError(
                Bilingual(
                    f'{where}: {key}.enabled = {enabled!r}: it is set by train.precision. Write "auto".',
                    f'{where}：{key}.enabled = {enabled!r}：这由 train.precision 决定。请写 "auto"。',
                )
            )
    for key, instead in (("optimizer", "train.learning_rate, weight_decay"), ("scheduler", "train.schedule")):
        fixed = [name for name, inner in value.get(key, {}).get("params", {}).items() if inner != "auto"]
        kind = value.get(key, {}).get("type", "AdamW")
        if fixed or (key == "optimizer" and kind not in ("Adam", "AdamW")):
            raise ConfigError(
                Bilingual(
                    f"{where}: siliang's settings determine the {key} ({instead}): AdamW, with siliang's schedule. "
                    'Remove it, or write "auto" for all of its params.',
                    f"{where}：{key} 由 siliang 的设置决定（{instead}）：AdamW，以及 siliang 的学习率调度。"
                    '请去掉，或把它的 params 都写成 "auto"。',
                )
            )
    stage = value.get("zero_optimization", {}).get("stage", 2)
    if stage not in (1, 2, 3):
        raise ConfigError(
            Bilingual(
                f"{where}: zero_optimization.stage = {stage!r}: must be 1, 2 or 3.",
                f"{where}：zero_optimization.stage = {stage!r}：只能是 1、2 或 3。",
            )
        )
    return value


def _read_json(path: Path) -> object:
    try:
        return read_json(path, most_bytes=2**20)
    except JsonError as error:
        raise ConfigError(
            Bilingual(
                f"distributed.deepspeed = {error.place(path)}: not valid JSON: {error}.",
                f"distributed.deepspeed = {error.place(path)}：不是有效的 JSON：{local(message_of(error), 'zh')}。",
            )
        ) from None
    except OSError as error:
        raise ConfigError(
            Bilingual(
                f"distributed.deepspeed = {path}: cannot be read: {error.strerror or error}.",
                f"distributed.deepspeed = {path}：无法读取：{error.strerror or error}。",
            )
        ) from None
