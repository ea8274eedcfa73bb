"""A run's settings: the one strict schema behind run.yaml, the flags of `siliang train`, and `siliang config`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from siliang import other_names
from siliang.config.data import DataConfig
from siliang.config.distributed import DistributedConfig
from siliang.config.explaining import explain, undecodable
from siliang.config.names import OWN_FIELDS, name_here, quoted
from siliang.config.section import RECORDED, Name, Names, Section, Settings, split_names
from siliang.config.train import TrainConfig
from siliang.files import absolute
from siliang.language import Bilingual, local, together
from siliang.safety.safe_yaml import dump_yaml
from siliang.secrets import shortened
from siliang.types import TRAINED_TASKS, ConfigError, TaskType, nearest

VIRTUAL_TOKENS = 20  # of a prompt without a given length, as in PEFT's examples and the tutorials


class MethodConfig(BaseModel):
    """The method's name, and any field of its PEFT config beside it: {name: lora, r: 16}."""

    model_config = ConfigDict(extra="allow")

    name: str = "lora"
    """One of `siliang methods`; prompt, p-tuning and prefix are understood too.

    `siliang methods` 中的一个名称；也可写作 prompt、p-tuning、prefix。"""

    def __str__(self) -> str:
        return self.name

    @field_validator("name")
    @classmethod
    def _whole_name(cls, name: str) -> str:
        from siliang.methods import whole_name

        return whole_name(name)

    @property
    def arguments(self) -> dict[str, Any]:
        """The fields of the method's config that were given, and the prompt's length where none was."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _known(self) -> MethodConfig:
        from siliang.methods import find_method  # torch: only when a config is really checked

        config = find_method(self.name).config
        if config is not None and config.is_prompt_learning and self.model_extra is not None:
            self.model_extra.setdefault("num_virtual_tokens", VIRTUAL_TOKENS)
        fields = {f.name for f in dataclasses.fields(config)} - OWN_FIELDS if config else set()
        for key, value in self.arguments.items():
            if key not in fields:
                hint = name_here(key, RunConfig, value, section="method", fields=fields) or nearest(key, fields)
                allowed = ", ".join(sorted(fields)) or "none"
                raise ConfigError(
                    Bilingual(
                        f"method.{key} is not a setting of {self.name}.{hint} Allowed: {allowed}.",
                        f"{self.name} 没有 method.{key} 这个配置项。{local(hint, 'zh')}可用：{allowed}。",
                    )
                )
            if isinstance(value, int) and abs(value) >= 2**31:
                shown = shortened(value, 40)
                raise ConfigError(
                    Bilingual(
                        f"method.{key} = {shown}: the number is too large.", f"method.{key} = {shown}：数字过大。"
                    )
                )
            if isinstance(value, str) and key in LISTS and re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)+", value):
                assert self.model_extra is not None
                names = split_names(value)
                numbers = key == "layers_to_transform" and all(name.isascii() and name.isdigit() for name in names)
                self.model_extra[key] = [int(name) for name in names] if numbers else names
        if config:
            try:
                config(**self.arguments)
            except ConfigError as error:
                raise ConfigError(together("method.", error.text)) from None
        return self


# Fields of a method's config that may name a folder here.
METHOD_FOLDERS = {"tokenizer_name_or_path"}
# Fields of a PEFT config that are lists of names, which the command line's user writes with commas.
LISTS = {
    "target_modules",
    "exclude_modules",
    "feedforward_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
}


def _method(value: object) -> object:
    name = value.get("name") if isinstance(value, dict) else value
    if isinstance(name, str) and (here := other_names.METHOD_VALUES.get(other_names.plain(name))):
        raise ConfigError(_written_here(f"method = {name!r}", here.split()))
    return {"name": value} if isinstance(value, str) else value


def _adapter(value: object) -> object:
    if isinstance(value, str) and other_names.is_method(value) and not Path(value).exists():
        here = other_names.METHOD_VALUES.get(other_names.plain(value), f"method={other_names.plain(value)}")
        raise ConfigError(
            _written_here(
                Bilingual(f"adapter = {value!r} is not an adapter", f"adapter = {value!r} 不是适配器"), here.split()
            )
        )
    return value


def _written_here(what: str, assignments: list[str]) -> Bilingual:
    shown = quoted(assignments)
    return Bilingual(f"{what}: here that is {shown}.", f"{local(what, 'zh')}：这里写作 {local(shown, 'zh')}。")


def _task(value: object) -> object:
    if not isinstance(value, str):
        return value
    if (here := other_names.TASK_VALUES.get(other_names.plain(value))) is not None:
        raise ConfigError(
            Bilingual(f"task = {value!r}: here that is `task={here}`.", f"task = {value!r}：这里写作 `task={here}`。")
        )
    name = value.lower().replace("-", "_")
    for task in TRAINED_TASKS:
        if task.lower() == name:
            return task
    allowed = [task.lower() for task in TRAINED_TASKS]
    tasks, alike = ", ".join(allowed), nearest(name, allowed)
    raise ConfigError(
        Bilingual(
            f"task = {value!r}: must be one of {tasks}.{alike}", f"task = {value!r}：只能是 {tasks} 之一。{alike.zh}"
        )
    )


def _quantization(value: object) -> object:
    if value is None or isinstance(value, dict | QuantizationConfig):
        return value
    hint = name_here("quantization", RunConfig, value)
    raise ConfigError(
        Bilingual(
            f"quantization = {value!r} is not a section.{hint}",
            f"quantization = {value!r} 不是一组配置项。{local(hint, 'zh')}",
        )
    )


class QuantizationConfig(Section):
    """The base model's linear layers quantized, as QLoRA has them. Needs bitsandbytes."""

    bits: Literal[4, 8] = 4
    """4 or 8.

    4 或 8。"""
    type: Literal["nf4", "fp4"] = "nf4"
    """The 16 values of 4 bits: nf4 suits weights, which are nearly normal.

    4 位所用的 16 个值：nf4 适合权重，因为权重接近正态分布。"""
    double: bool = True
    """Quantize the scales as well: 0.4 bits less a parameter.

    缩放系数也量化：每个参数再省 0.4 位。"""
    compute_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What a layer's weight becomes to be multiplied. auto: bf16 where the hardware has it, fp16 on older GPUs.

    层的权重在相乘时转换成的格式。auto：硬件支持时用 bf16，较旧的 GPU 用 fp16。"""


class RunConfig(Settings):
    """One run."""

    model: Name
    """The base model: a folder, or a name on the hub.

    基座模型：文件夹，或 Hub 上的名称。"""
    revision: str | None = None
    """The base model's revision on the hub.

    基座模型在 Hub 上的版本。"""
    task: Annotated[TaskType, BeforeValidator(_task)]
    """What is learned: causal_lm (text from text), seq_cls (a class for a text), token_cls (a tag for each word),
    seq_2_seq_lm (text from text, by an encoder and a decoder) or question_ans (the answer's place in a context).

    要学习的任务：causal_lm（由文本生成文本）、seq_cls（文本分类）、token_cls（给每个词打标签）、seq_2_seq_lm（由编码器
    和解码器从文本生成文本），或 question_ans（答案在段落中的位置）。"""
    method: Annotated[MethodConfig, BeforeValidator(_method)] = Field(default_factory=MethodConfig)
    """What is tuned: a name of `siliang methods`, or {name: lora, r: 16, ...}.

    微调方法：`siliang methods` 中的一个名称，或 {name: lora, r: 16, ...}。"""
    adapter: Annotated[Name | None, BeforeValidator(_adapter)] = None
    """An adapter that is trained further: a run's folder, a checkpoint in it, an adapter folder of siliang's or of
    PEFT's, or a name on the hub. Its weights are the start and its config is the method; of a run, model, task,
    template and labels are taken over where they are not given. The adapter itself is not changed.

    要继续训练的适配器：运行的文件夹、其中的检查点、siliang 或 PEFT 的适配器文件夹，或 Hub 上的名称。以它的权重为起点，
    以它的配置为方法；如果来自一次运行，没有给出的 model、task、template 和 labels 也从中取得。适配器本身不会改变。"""
    quantization: Annotated[QuantizationConfig | None, BeforeValidator(_quantization)] = None
    """The base model in 4 or 8 bits under the adapter: {bits: 4}. None: as it is.

    适配器之下的基座模型量化为 4 或 8 位：{bits: 4}。None：不量化。"""
    data: DataConfig
    """The data.

    数据。"""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """The training.

    训练。"""
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    """How several devices share the training.

    多个设备如何共同训练。"""
    accept: Names = Field(default_factory=list)
    """Findings of `siliang check` that are intended, by code, such as SL002: they are shown, and do not stop the run.
    SL023 and SL028 cannot be accepted: the run would end with an error.

    `siliang check` 的检查结果中有意为之的，写规则编号，如 SL002：仍会显示，但不会使运行停止。SL023 和 SL028 不能这样忽
    略：运行终究会出错。"""
    output: Name
    """The run's folder: made by the run, and must not hold anything yet.

    运行的文件夹：由运行创建，事先不能有任何内容。"""

    @model_validator(mode="after")
    def _of_the_adapter(self) -> RunConfig:
        if self.adapter is not None and "method" not in self.model_fields_set:
            raise ConfigError(
                Bilingual(
                    f"adapter = {self.adapter!r}: `method` has to be the adapter's: start_adapter.filled_in sets it.",
                    f"adapter = {self.adapter!r}：`method` 必须是该适配器的方法：由 start_adapter.filled_in 设置。",
                )
            )
        return self

    @model_validator(mode="after")
    def _with_evaluations(self) -> RunConfig:
        data = self.data
        self.check_evaluations(bool(data.eval) or data.test_size > 0 or data.validation_size is not None)
        return self

    def check_evaluations(self, held_out: bool) -> None:
        """
        Args:
            held_out: There are held-out rows.

        Raises:
            ConfigError: train.patience or train.best has no evaluations to go by.
        """
        t = self.train
        counts = Bilingual("it counts evaluations", "它按评估的次数计")
        chooses = Bilingual("it chooses among evaluations", "它在各次评估中选取")
        for name, value, why in (("patience", t.patience, counts), ("best", t.best, chooses)):
            if value is not None and not (held_out and t.eval_every):
                rows = Bilingual(
                    "held-out rows (data.eval, or data.test_size)", "验证集（data.eval 或 data.test_size）"
                )
                missing = rows if not held_out else Bilingual("train.eval_every", "设置 train.eval_every")
                raise ConfigError(
                    Bilingual(
                        f"train.{name} = {value!r} needs {missing}: {why}.",
                        f"train.{name} = {value!r} 需要{missing.zh}：{why.zh}。",
                    )
                )

    @model_validator(mode="after")
    def _with_deepspeed(self) -> RunConfig:
        if self.distributed.strategy != "deepspeed":
            return self
        pure = self.train.precision.startswith("pure-")
        reasons = {
            "quantization": self.quantization
            and Bilingual(
                "DeepSpeed cannot shard quantized weights: use strategy ddp",
                "DeepSpeed 不能分片量化的权重：请用 strategy ddp",
            ),
            "train.on_nan": self.train.nan_skips
            and Bilingual(
                "DeepSpeed makes its step before the gradient can be seen: use stop",
                "DeepSpeed 在能看到梯度之前就完成了这一步：请用 stop",
            ),
            "train.optimizer": self.train.optimizer != "adamw"
            and Bilingual(
                "siliang saves its state of AdamW alone: use adamw", "siliang 只保存它的 AdamW 状态：请用 adamw"
            ),
            "train.fit": self.train.fit
            and Bilingual(
                "a step cannot be repeated under DeepSpeed: leave it off", "DeepSpeed 下不能重做一步：请不要打开"
            ),
            "train.precision": pure
            and Bilingual(
                "DeepSpeed keeps its weights in half precision as it is: use bf16 or fp16",
                "DeepSpeed 本来就以半精度保存权重：请用 bf16 或 fp16",
            ),
        }
        for name, reason in reasons.items():
            if reason:
                raise ConfigError(
                    Bilingual(
                        f"{name} and distributed.strategy = deepspeed: {reason}.",
                        f"{name} 与 distributed.strategy = deepspeed 不能同时使用：{local(reason, 'zh')}。",
                    )
                )
        return self

    @classmethod
    def build(cls, values: Mapping[str, object], *, source: str = "the settings") -> RunConfig:
        """Checks `values` and fills in the defaults.

        Raises:
            ConfigError: A key is unknown (with the nearest names), missing, or has a value that is not allowed.
        """
        if (strange := undecodable(values)) is not None:
            raise ConfigError(
                Bilingual(
                    f"{source}: {strange} holds bytes that are not UTF-8: rename it.",
                    f"{local(source, 'zh')}：{strange} 含有不是 UTF-8 的字节：请改名。",
                )
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(together(source, Bilingual(": ", "："), explain(error, cls))) from None
        except (TypeError, OverflowError, RecursionError) as error:  # of values that no setting could have
            raise ConfigError(
                Bilingual(
                    f"{source}: a value is of the wrong kind: {error}.", f"{source}：有一个值的类型不对：{error}。"
                )
            ) from None

    @classmethod
    def recorded(cls, values: Mapping[str, object]) -> RunConfig:
        """The settings of a record, checked as `build` does, without a look at any file that they name.

        Raises:
            ConfigError: A key is unknown or missing, or has a value that is not allowed.
        """
        try:
            return cls.model_validate(values, context=RECORDED)
        except ValidationError as error:
            wrong = explain(error, cls, others_too=False)
            raise ConfigError(together("config", Bilingual(": ", "："), wrong)) from None
        except (TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(
                Bilingual(f"config: a value is of the wrong kind: {error}.", f"config：有一个值的类型不对：{error}。")
            ) from None

    def with_strategy(self, strategy: str) -> RunConfig:
        """The same run, by several devices that share its model so."""
        return self.model_copy(update={"distributed": self.distributed.model_copy(update={"strategy": strategy})})

    def resolved(self) -> RunConfig:
        """The same run from any working directory: the names of files and folders that are here are absolute. Names on
        the hub stay names."""
        return self.with_files(absolute, str(Path(self.output).absolute()))

    def with_files(self, change: Callable[[str], str], output: str) -> RunConfig:
        """The same run with other names for the files and folders that it reads.

        Args:
            change: Returns the new name of what a setting names, which may be a name on the hub.
            output: The new output folder.
        """
        values = self.model_dump(mode="json")
        data, method = values["data"], values["method"]
        for part in ("train", "eval"):
            if isinstance(data[part], list):
                data[part] = [s | {"path": change(s["path"])} if isinstance(s, dict) else change(s) for s in data[part]]
            elif data[part] is not None:
                data[part] = change(data[part])
        if data["template"].endswith((".yaml", ".yml")):
            data["template"] = change(data["template"])
        for name in METHOD_FOLDERS & method.keys():
            method[name] = method[name] and change(str(method[name]))
        values["model"] = change(self.model)
        values["adapter"] = self.adapter and change(self.adapter)
        values["output"] = output
        return RunConfig.build(values)

    def to_yaml(self) -> str:
        """The whole config, defaults included, as run.yaml holds it."""
        return dump_yaml(self.model_dump(mode="json"))
