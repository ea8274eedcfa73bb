"""Head only: the encoder is frozen, the task's new head is trained. The baseline that every method must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from siliang.language import Bilingual
from siliang.methods.config import PeftConfig
from siliang.methods.method import Method, Parts
from siliang.types import PeftType, TargetError


@dataclass(kw_only=True)
class HeadConfig(PeftConfig):
    """Trains `modules_to_save`, which for a task with a head is that head, and nothing else."""

    peft_type: ClassVar[str] = PeftType.HEAD


class Head(Method[HeadConfig]):
    """The modules that are saved whole, and nothing else."""

    name = "head"
    config = HeadConfig
    learning_rate = 1e-3
    learning_rate_source = Bilingual(
        "Adam's own default (Kingma and Ba 2014); a linear probe is not sensitive to it",
        "Adam 的默认值（Kingma 和 Ba 2014）；线性探针对它不敏感",
    )
    trains = Bilingual("the task's head alone: the baseline", "任务头（对照基线）")
    freezes_the_base = False
    is_baseline = True

    def attach(self, model: nn.Module, config: HeadConfig, *, saved: Sequence[str], from_file: bool) -> Parts:
        if not saved:
            raise TargetError(
                Bilingual(
                    "Training the head alone needs a head: task SEQ_CLS, TOKEN_CLS or QUESTION_ANS.",
                    "只训练任务头的方法需要任务头：任务须为 SEQ_CLS、TOKEN_CLS 或 QUESTION_ANS。",
                )
            )
        return Parts()
