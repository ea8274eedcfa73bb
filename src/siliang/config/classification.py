"""The settings of classification: what the labels are, and how they are learned and used."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from siliang.config.section import Section
from siliang.language import Bilingual
from siliang.types import ConfigError, TaskType

Problem = Literal["one_label", "several_labels", "number", "ordered"]
SEPARATORS = {"comma": ",", "semicolon": ";", "pipe": "|", "slash": "/", "space": " ", "tab": "\t"}
Weight = Annotated[float, Field(gt=0.0)]


def _separator(value: object) -> object:
    if not isinstance(value, str) or value == "auto":
        return value
    separator = SEPARATORS.get(value, value)
    if len(separator) != 1 or separator in "\r\n":
        raise ConfigError(
            Bilingual(
                f"classification.label_separator = {value!r}: must be one character, such as ';', or auto.",
                f"classification.label_separator = {value!r}：应为一个字符（如 ';'）或 auto。",
            )
        )
    return separator


def _weights(value: object) -> object:
    """A label may be written as a number."""
    if not isinstance(value, dict):
        return value
    for name, weight in value.items():
        if isinstance(name, bool):
            raise ConfigError(
                Bilingual(
                    f"classification.class_weights: YAML reads a label such as yes, no or true as {name}: write it in "
                    "quotes.",
                    f"classification.class_weights：YAML 把 yes、no、true 这样的标签读作 {name}：请加引号。",
                )
            )
        if isinstance(weight, int | float) and not weight > 0:
            raise ConfigError(
                Bilingual(
                    f"classification.class_weights: {name} = {weight}: a weight must be more than 0.",
                    f"classification.class_weights：{name} = {weight}：权重须大于 0。",
                )
            )
    return {str(name): weight for name, weight in value.items()}


class ClassificationConfig(Section):
    """What the labels of the task seq_cls are, and how they are learned and used."""

    problem: Literal["auto"] | Problem = "auto"
    """What a label is. one_label: one of several classes. several_labels: any number of them, from lists, or from texts
    with a separator. number: a value to be estimated (a regression). ordered: classes in an order, such as stars. auto:
    what the labels of the training rows look like, never ordered; the log shows what and why.

    标签是什么。one_label：若干类别中的一个。several_labels：任意多个类别，写成列表，或用分隔符写在一起。number：要估计的数值
    （回归）。ordered：有顺序的类别，如星级。auto：由训练样本的标签判断，不会判为 ordered；日志会写明判断结果和理由。"""
    label_separator: Annotated[str | None, BeforeValidator(_separator)] = "auto"
    """What separates several labels of a text: one character, or space, tab. auto: found in the labels. null: a text is
    one label. Only for several_labels.

    一段文本中分隔多个标签的字符：单个字符，或 space、tab。auto：根据标签判断。null：整段文本是一个标签。只用于
    several_labels。"""
    class_weights: Annotated[Literal["balanced"] | dict[str, Weight] | None, BeforeValidator(_weights)] = None
    """How much the loss weighs each class, such as {neg: 2}; 1 for those not named. balanced: rows / (classes x rows of
    the class); for several_labels, rows without the label / rows with it. A weight counts only the rows that have the
    label. Not for number.

    损失中每个类别的权重，如 {neg: 2}；未写出的为 1。balanced：样本数 / (类别数 x 该类样本数)；several_labels 时为
    没有该标签的样本数 / 有该标签的样本数。权重只作用于有该标签的样本。不能用于 number。"""
    focal_gamma: Annotated[float, Field(gt=0.0)] | None = None
    """Focal loss: each row's loss is multiplied by (1 - p)^gamma, p the probability of its label; 2 is common. For
    one_label and several_labels.

    焦点损失：每条样本的损失乘以 (1 - p)^gamma，p 是其标签的概率；常用 2。用于 one_label 和 several_labels。"""
    threshold: Literal["auto"] | Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """The probability from which a label is given, for several_labels. auto: for each label the one with the highest F1
    on the held-out rows at the end of the training; the run's own metrics, and the table of a comparison, are those
    of 0.5.

    several_labels 中，概率达到多少就给出标签。auto：训练结束时，为每个标签选取在验证集上 F1 最高的阈值；运行自身的指标
    和比较的表格仍按 0.5 计算。"""
    calibrate: bool = False
    """Divide the logits by a temperature, which is fitted to the held-out rows at the end of the training, so that the
    probabilities of predictions are as high as their accuracy. The record has the error before and after.

    用温度缩放 logits，温度在训练结束时由验证集拟合，使预测的概率与准确率相符。记录中有校准前后的误差。"""
    min_confidence: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Below this probability of the most probable class, a prediction is "no label". For one_label and ordered.

    最可能的类别的概率低于此值时，预测为“无标签”。用于 one_label 和 ordered。"""

    def check_with(self, task: TaskType, stratify: bool, label_smoothing: float) -> None:
        """
        Raises:
            ConfigError: The section is not for this task, or does not go together with data.stratify or
                train.label_smoothing.
        """
        problem = self.problem
        if (name := task.lower()) != "seq_cls":
            raise ConfigError(
                Bilingual(
                    f"classification is a section of the task seq_cls, and task = {name}: leave it out.",
                    f"classification 这一组只用于任务 seq_cls，而 task = {name}：请去掉。",
                )
            )
        if stratify and problem in ("several_labels", "number"):
            raise ConfigError(
                Bilingual(
                    f"data.stratify needs one class a row, and classification.problem = {problem}: leave it out.",
                    f"data.stratify 需要每条样本一个类别，而 classification.problem = {problem}：请去掉。",
                )
            )
        if label_smoothing and (self.focal_gamma or problem not in ("auto", "one_label")):
            why = "focal_gamma" if self.focal_gamma else f"problem = {problem}"
            raise ConfigError(
                Bilingual(
                    f"train.label_smoothing = {label_smoothing:g} cannot be used with classification.{why}: leave it "
                    "at 0.",
                    f"train.label_smoothing = {label_smoothing:g} 不能与 classification.{why} 同时使用：请保持 0。",
                )
            )

    @model_validator(mode="after")
    def _of_the_problem(self) -> ClassificationConfig:
        lacks = {
            "class_weights": ("number",),
            "focal_gamma": ("number", "ordered"),
            "calibrate": ("number",),
            "min_confidence": ("number", "several_labels"),
            "threshold": ("number", "one_label", "ordered"),
        }
        for name, problems in lacks.items():
            value = getattr(self, name)
            if self.problem in problems and value != type(self).model_fields[name].default:
                raise ConfigError(
                    Bilingual(
                        f"classification.{name} = {value!r} is not for problem = {self.problem}: leave it out.",
                        f"classification.{name} = {value!r} 不能用于 problem = {self.problem}：请去掉。",
                    )
                )
        return self
