"""The settings of learning from preferences."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from siliang.config.section import Section
from siliang.language import Bilingual
from siliang.types import ConfigError

LossName = Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "orpo", "simpo", "cpo", "kto"]
# of the losses that differ from the others
DEFAULTS: dict[LossName, dict[str, float]] = {
    "simpo": {"beta": 2.0, "gamma": 0.5},
    "orpo": {"nll_weight": 1.0},
    "cpo": {"nll_weight": 1.0},
}


class PreferenceConfig(Section):
    """The loss of the task preference."""

    loss: LossName = "sigmoid"
    """The loss. sigmoid is DPO's own, sigmoid_norm divides its log-probabilities by the number of tokens; hinge,
    ipo and robust are variants; these five compare the model with the base model. orpo, simpo and cpo do without
    it. kto learns from single answers that are marked as good or bad.

    损失函数。sigmoid 是 DPO 原来的损失，sigmoid_norm 把其中的对数概率除以词元数；hinge、ipo 和 robust 是它的变体；这五
    种都与基座模型比较。orpo、simpo 和 cpo 不需要比较。kto 从标为好或坏的单个回答学习。"""
    beta: Annotated[float, Field(gt=0.0)] = 0.1
    """How strongly the loss weighs the difference of two answers: DPO's beta, IPO's tau, the weight of ORPO's odds
    ratio. The default is 2.0 with simpo, otherwise 0.1.

    损失函数对两个回答之差的放大倍数：DPO 的 beta、IPO 的 tau、ORPO 中比值比的权重。simpo 默认是 2.0，其余是 0.1。"""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """The share of pairs that are expected to be in the wrong order; for sigmoid, sigmoid_norm, simpo, cpo and robust,
    which needs it.

    预计顺序写反的样本比例；用于 sigmoid、sigmoid_norm、simpo、cpo，以及必须设置它的 robust。"""
    gamma: Annotated[float, Field(ge=0.0)] | None = None
    """SimPO's target margin between the two rewards. The default with simpo is 0.5; only for simpo.

    SimPO 中两个奖励之间的目标差距。simpo 默认是 0.5；只用于 simpo。"""
    nll_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """The weight of the loss of the chosen answers' tokens, which is added. The default is 1.0 with orpo and cpo,
    otherwise 0.

    额外加上的、所选回答各词元损失的权重。orpo 和 cpo 默认是 1.0，其余是 0。"""

    desirable_weight: Annotated[float, Field(gt=0.0)] = 1.0
    """The weight of the loss of good answers, with kto.

    kto 中好回答的损失权重。"""
    undesirable_weight: Annotated[float, Field(gt=0.0)] = 1.0
    """The weight of the loss of bad answers, with kto. With many more good answers than bad ones, set it to about their
    ratio.

    kto 中坏回答的损失权重。好回答远多于坏回答时，可设为两者数目之比。"""

    @property
    def compares(self) -> bool:
        """Whether the loss compares the model with the base model."""
        return self.loss not in ("orpo", "simpo", "cpo")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_loss(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        return {**DEFAULTS.get(values.get("loss", "sigmoid"), {}), **values}

    @model_validator(mode="after")
    def _of_the_loss(self) -> PreferenceConfig:
        if self.gamma is not None and self.loss != "simpo":
            raise ConfigError(
                Bilingual(
                    f"preference.gamma = {self.gamma:g} is a setting of simpo, and preference.loss is {self.loss}: "
                    "leave it out.",
                    f"preference.gamma = {self.gamma:g} 只用于 simpo，而 preference.loss 是 {self.loss}：请去掉。",
                )
            )
        for name in ("desirable_weight", "undesirable_weight"):
            if getattr(self, name) != 1.0 and self.loss != "kto":
                raise ConfigError(
                    Bilingual(
                        f"preference.{name} = {getattr(self, name):g} is a setting of kto, and preference.loss is "
                        f"{self.loss}: leave it out.",
                        f"preference.{name} = {getattr(self, name):g} 只用于 kto，而 preference.loss 是 {self.loss}："
                        "请去掉。",
                    )
                )
        if self.nll_weight and self.loss == "kto":
            raise ConfigError(
                Bilingual(
                    f"preference.nll_weight = {self.nll_weight:g}: kto has none; leave it at 0.",
                    f"preference.nll_weight = {self.nll_weight:g}：kto 没有这一项；请保持 0。",
                )
            )
        if self.label_smoothing and self.loss in ("hinge", "ipo", "orpo", "kto"):
            raise ConfigError(
                Bilingual(
                    f"preference.label_smoothing = {self.label_smoothing:g}: {self.loss} has none; leave it at 0.",
                    f"preference.label_smoothing = {self.label_smoothing:g}：{self.loss} 没有这一项；请保持 0。",
                )
            )
        if self.loss == "robust" and not self.label_smoothing:
            raise ConfigError(
                Bilingual(
                    "preference.loss = 'robust' needs preference.label_smoothing, the share of pairs in the wrong "
                    "order, such as 0.1; without it, it is sigmoid.",
                    "preference.loss = 'robust' 需要 preference.label_smoothing，即顺序写反的样本比例，如 0.1；"
                    "为 0 时就是 sigmoid。",
                )
            )
        return self
