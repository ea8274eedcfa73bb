"""The settings of a run: the strict schema of run.yaml, the flags of `siliang train`, and `siliang config`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from siliang.config.classification import ClassificationConfig
from siliang.config.data import DataConfig
from siliang.config.distributed import DistributedConfig
from siliang.config.embedding import EmbeddingConfig, RerankerConfig
from siliang.config.evaluation import EvaluationConfig
from siliang.config.explaining import explain, undecodable
from siliang.config.names import OWN_FIELDS, name_hint
from siliang.config.preference import PreferenceConfig
from siliang.config.quantization import QuantizationConfig
from siliang.config.section import RECORDED, THE_SETTINGS, Name, Names, Settings, split_names
from siliang.config.top_values import as_adapter, as_method, as_task
from siliang.config.train import TrainConfig
from siliang.data.templates import is_file
from siliang.files import absolute
from siliang.language import Bilingual, local, together
from siliang.safety.safe_yaml import dump_yaml
from siliang.secrets import shortened
from siliang.types import ConfigError, TaskType, nearest

VIRTUAL_TOKENS = 20  # default number of virtual tokens, as in PEFT's examples


class MethodConfig(BaseModel):
    """The method's name, and any fields of its PEFT config: {name: lora, r: 16}."""

    model_config = ConfigDict(extra="allow")

    name: str = "lora"
    """A name of `siliang methods`; prompt, p-tuning and prefix are allowed, too.

    `siliang methods` 中的一个名称；也可写作 prompt、p-tuning、prefix。"""

    def __str__(self) -> str:
        return self.name

    @field_validator("name")
    @classmethod
    def _canonical_name(cls, name: str) -> str:
        from siliang.methods import canonical_name

        return canonical_name(name)

    @property
    def arguments(self) -> dict[str, Any]:
        """The given fields of the method's config; for a prompt, also the default number of virtual tokens."""
        return dict(self.model_extra or {})

    def with_files(self, change: Callable[[str], str | None]) -> dict[str, Any]:
        """The given fields with other names for the files and folders that they name."""
        from siliang.methods import find_method

        config, given = find_method(self.name).config, self.model_dump(mode="json", exclude={"name"})
        return given if config is None else config.with_files(given, change)

    @model_validator(mode="after")
    def _known(self) -> MethodConfig:
        from siliang.methods import find_method  # imports torch, so only when a config is validated
        from siliang.methods.fields import takes_list

        config = find_method(self.name).config
        counted = config is not None and config.is_prompt_learning and not config.has_own_length
        if counted and self.model_extra is not None:
            self.model_extra.setdefault("num_virtual_tokens", VIRTUAL_TOKENS)
        others = OWN_FIELDS | (config.NOT_IN_RUNS.keys() if config else set())
        fields = {f.name for f in dataclasses.fields(config)} - others if config else set()
        for key, value in self.arguments.items():
            if config is not None and (why := config.NOT_IN_RUNS.get(key)) is not None:
                raise ConfigError(
                    Bilingual(f"method.{key} cannot be set: {why}.", f"不能设置 method.{key}：{why.zh}。")
                )
            if key not in fields:
                hint = name_hint(key, RunConfig, value, section="method", fields=fields) or nearest(key, fields)
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
            if config is None or not isinstance(value, str):
                continue
            of_names, of_numbers = (takes_list(config, key, of) for of in (str, int))
            if (of_names or of_numbers) and re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)+", value):
                assert self.model_extra is not None
                names = split_names(value)
                numbers = of_numbers and all(name.isascii() and name.isdigit() for name in names)
                self.model_extra[key] = [int(name) for name in names] if numbers else names
        if config:
            try:
                config(**self.arguments)
            except ConfigError as error:
                raise ConfigError(together("method.", error.text)) from None
        return self


def _quantization(value: object) -> object:
    if value is None or isinstance(value, dict | QuantizationConfig):
        return value
    hint = name_hint("quantization", RunConfig, value)
    raise ConfigError(
        Bilingual(
            f"quantization = {value!r} is not a section.{hint}",
            f"quantization = {value!r} 不是一组配置项。{local(hint, 'zh')}",
        )
    )


class RunConfig(Settings):
    """One run."""

    model: Name
    """The base model: a folder, or a name on the Hub.

    基座模型：文件夹，或 Hub 上的名称。"""
    revision: str | None = None
    """The base model's revision on the Hub.

    基座模型在 Hub 上的版本。"""
    task: Annotated[TaskType, BeforeValidator(as_task)]
    """The task: causal_lm (generate text), preference (generate the better of two texts), reward (tell which of two
    texts is better), seq_cls (classify a text), token_cls (tag each word), seq_2_seq_lm (generate text with an encoder
    and a decoder), question_ans (find the answer in a context), embedding (a vector for a text) or reranker (tell how
    well a text fits a query).

    任务：causal_lm（生成文本）、preference（学习较好的回答）、reward（给回答打分）、seq_cls（文本分类）、token_cls（给每个词
    打标签）、seq_2_seq_lm（由编码器和解码器生成文本）、question_ans（在段落中找出答案）、embedding（文本的向量），或
    reranker（给查询与文本的相关程度打分）。"""
    method: Annotated[MethodConfig, BeforeValidator(as_method)] = Field(default_factory=MethodConfig)
    """The fine-tuning method: a name of `siliang methods`, or {name: lora, r: 16, ...}.

    微调方法：`siliang methods` 中的一个名称，或 {name: lora, r: 16, ...}。"""
    adapter: Annotated[Name | None, BeforeValidator(as_adapter)] = None
    """An adapter to train further: a run's folder, a checkpoint in it, an adapter folder of siliang or PEFT, or a name
    on the Hub. Training starts from its weights, with its config as the method. For a run's folder, settings that are
    not given (model, task, template, labels) come from that run. The adapter itself is not changed.

    要继续训练的适配器：运行的文件夹、其中的检查点、siliang 或 PEFT 的适配器文件夹，或 Hub 上的名称。以它的权重为起点，
    以它的配置为方法；如果来自一次运行，没有给出的 model、task、template 和 labels 也从中取得。适配器本身不会改变。"""
    quantization: Annotated[QuantizationConfig | None, BeforeValidator(_quantization)] = None
    """Quantization of the base model: {bits: 4}. None: not quantized.

    基座模型的量化：{bits: 4}。None：不量化。"""
    data: DataConfig
    """The data.

    数据。"""
    preference: PreferenceConfig | None = None
    """The loss of the task preference, {loss: simpo}. None: DPO's, with beta = 0.1.

    preference 任务的损失函数，如 {loss: simpo}。None：DPO 的损失，beta = 0.1。"""
    embedding: EmbeddingConfig | None = None
    """The vector and the loss of the task embedding, {pooling: cls}. None: the defaults.

    embedding 任务的向量和损失函数，如 {pooling: cls}。None：默认值。"""
    reranker: RerankerConfig | None = None
    """The loss of the task reranker, {loss: mse}. None: the defaults.

    reranker 任务的损失函数，如 {loss: mse}。None：默认值。"""
    classification: ClassificationConfig | None = None
    """What the labels of the task seq_cls are, {problem: several_labels}, and how they are learned and used. None: what
    they look like.

    seq_cls 任务的标签是什么，如 {problem: several_labels}，以及如何学习和使用。None：由标签判断。"""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """The training.

    训练。"""
    evaluation: EvaluationConfig | None = None
    """The measures of written texts: {measures: [rouge_l, bleu]}. None: the defaults.

    所写文本的指标，如 {measures: [rouge_l, bleu]}。None：默认值。"""
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    """Training on several devices.

    多个设备上的训练。"""
    accept: Names = Field(default_factory=list)
    """Codes of findings of `siliang check` to accept, such as SL002: they are shown, and do not stop the run. SL023,
    SL028 and SL039 cannot be accepted: the run would end with an error.

    要接受的 `siliang check` 检查结果的规则编号，如 SL002：仍会显示，但不会使运行停止。SL023、SL028 和 SL039 不能接受：
    运行终究会出错。"""
    output: Name
    """The run's folder. The run creates it; it must not exist, or must be empty.

    运行的文件夹。由运行创建；事先不存在，或为空。"""

    @model_validator(mode="after")
    def _of_the_adapter(self) -> RunConfig:
        if self.adapter is not None and "method" not in self.model_fields_set:
            raise ConfigError(
                Bilingual(
                    f"adapter = {self.adapter!r}: `method` must be the adapter's method: start_adapter.filled_in sets "
                    "it.",
                    f"adapter = {self.adapter!r}：`method` 必须是该适配器的方法：由 start_adapter.filled_in 设置。",
                )
            )
        return self

    @model_validator(mode="after")
    def _of_the_task(self) -> RunConfig:
        task = self.task.lower()
        for section in ("preference", "embedding", "reranker"):
            if getattr(self, section) is not None and task != section:
                raise ConfigError(
                    Bilingual(
                        f"{section} is a section of the task {section}, and task = {task}: leave it out.",
                        f"{section} 这一组只用于任务 {section}，而 task = {task}：请去掉。",
                    )
                )
        if self.classification is not None:
            self.classification.check_with(self.task, self.data.stratify, self.train.label_smoothing)
        settings = self.preference or PreferenceConfig()
        if self.adapter is not None and self.task.lower() == "preference" and settings.compares:
            raise ConfigError(
                Bilingual(
                    f"adapter = {self.adapter!r}: preference.loss = {settings.loss} compares the model with its base "
                    "model, which would be without this adapter.\nMerge it (siliang merge) and name the result as "
                    "model, or use preference.loss = simpo, orpo or cpo.",
                    f"adapter = {self.adapter!r}：preference.loss = {settings.loss} 要与基座模型比较，"
                    "而基座模型不含这个适配器。\n请先合并（siliang merge），再用合并后的模型作为 model，"
                    "或改用 preference.loss = simpo、orpo 或 cpo。",
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
            held_out: Whether the run has held-out rows.

        Raises:
            ConfigError: train.patience or train.best is set, but the run has no evaluations.
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
                "DeepSpeed updates the weights before the gradient can be checked: use stop",
                "DeepSpeed 在检查梯度之前就更新了权重：请用 stop",
            ),
            "train.optimizer": self.train.optimizer != "adamw"
            and Bilingual(
                "siliang can save only the state of AdamW: use adamw", "siliang 只能保存 AdamW 的状态：请用 adamw"
            ),
            "train.fit": self.train.fit
            and Bilingual("DeepSpeed cannot repeat a step: leave it off", "DeepSpeed 不能重做一步：请不要打开"),
            "train.precision": pure
            and Bilingual(
                "DeepSpeed always stores its weights in half precision: use bf16 or fp16",
                "DeepSpeed 总是以半精度保存权重：请用 bf16 或 fp16",
            ),
        }
        for name, reason in reasons.items():
            if reason:
                raise ConfigError(
                    Bilingual(
                        f"{name} cannot be used with distributed.strategy = deepspeed: {reason}.",
                        f"{name} 不能与 distributed.strategy = deepspeed 同时使用：{local(reason, 'zh')}。",
                    )
                )
        return self

    @classmethod
    def build(cls, values: Mapping[str, object], *, source: str = THE_SETTINGS) -> RunConfig:
        """Checks `values` and fills in the defaults.

        Raises:
            ConfigError: A key is unknown (with the nearest names), missing, or has a value that is not allowed.
        """
        if (invalid := undecodable(values)) is not None:
            raise ConfigError(
                Bilingual(
                    f"{source}: {invalid} has bytes that are not UTF-8: rename it.",
                    f"{local(source, 'zh')}：{invalid} 含有不是 UTF-8 的字节：请改名。",
                )
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(together(source, Bilingual(": ", "："), explain(error, cls))) from None
        except (TypeError, OverflowError, RecursionError) as error:  # for values that pydantic cannot process
            raise ConfigError(
                Bilingual(
                    f"{source}: a value has the wrong type: {error}.",
                    f"{local(source, 'zh')}：有一个值的类型不对：{error}。",
                )
            ) from None

    @classmethod
    def recorded(cls, values: Mapping[str, object]) -> RunConfig:
        """The settings of a record, checked as by `build`, but without access to the files that they name.

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
                Bilingual(f"config: a value has the wrong type: {error}.", f"config：有一个值的类型不对：{error}。")
            ) from None

    def with_strategy(self, strategy: str) -> RunConfig:
        """The same run with another distributed strategy."""
        return self.model_copy(update={"distributed": self.distributed.model_copy(update={"strategy": strategy})})

    def resolved(self) -> RunConfig:
        """The same run for any working directory: the names of existing files and folders are absolute. Names on the
        Hub stay as they are."""
        return self.with_files(absolute, str(Path(self.output).absolute()))

    def with_files(self, change: Callable[[str], str], output: str) -> RunConfig:
        """The same run with other names for the files and folders that it reads.

        Args:
            change: Maps the name of a file, of a folder or on the Hub to its new name.
            output: The new output folder.
        """
        values = self.model_dump(mode="json")
        data = values["data"]
        for part in ("train", "eval"):
            if isinstance(data[part], list):
                data[part] = [s | {"path": change(s["path"])} if isinstance(s, dict) else change(s) for s in data[part]]
            elif data[part] is not None:
                data[part] = change(data[part])
        if is_file(data["template"]):
            data["template"] = change(data["template"])
        values["method"] = {"name": self.method.name} | self.method.with_files(change)
        values["model"] = change(self.model)
        values["adapter"] = self.adapter and change(self.adapter)
        values["output"] = output
        return RunConfig.build(values)

    def with_template(self, name: str) -> RunConfig:
        """The same run with a template of this name."""
        return self.model_copy(update={"data": self.data.model_copy(update={"template": name})})

    def to_yaml(self) -> str:
        """The content of run.yaml: all settings, defaults included."""
        return dump_yaml(self.model_dump(mode="json"))
